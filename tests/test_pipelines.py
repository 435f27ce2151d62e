"""What the compiled pipelines say to a cluster and show on its page, field by field, for every pipeline and every step.

Read from the files that come along; that these are what the sources compile to is checked in test_launch.py.
"""

import re

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from slimline import launch, recipe, technique

PIPELINES = recipe.pipelines()
LIGHT = {
    "begin", "finish", "plan", "champion", "champion-language", "gate", "gate-language", "register", "promote",
    "promote-language", "rollback", "report",
}  # fmt: skip
ON_THE_PROCESSOR = LIGHT | {"fetch", "fetch-language", "export", "export-language"}
ALONE = {"source", "data", "task", "name", "margin", "seed", "to_version", "reason"}
MEASURING = ("train", "distill", "prune", "attention", "quantize", "export", "evaluate", "gate", "fetch")


def documents(pipeline):
    spec, platform = yaml.safe_load_all(recipe.pipeline_file(pipeline).read_text())
    return spec, platform["platforms"]["kubernetes"]


def parameters(pipeline):
    return documents(pipeline)[0]["root"]["inputDefinitions"]["parameters"]


def dags(spec):
    yield "root", spec["root"], spec["root"]["dag"]
    yield from ((name, c, c["dag"]) for name, c in spec["components"].items() if "dag" in c)


def leaves(spec):
    """(name of the port, task, executor label) of every step."""
    for _, _, dag in dags(spec):
        for task in dag["tasks"].values():
            component = spec["components"][task["componentRef"]["name"]]
            if "executorLabel" in component:
                port = re.sub(r"^comp-|-\d+$", "", task["componentRef"]["name"])
                yield port, task, component["executorLabel"]


def every_step():
    for pipeline in PIPELINES:
        spec, platform = documents(pipeline)
        for port, task, label in leaves(spec):
            executor = spec["deploymentSpec"]["executors"][label]["container"]
            asked = platform["deploymentSpec"]["executors"][label]
            yield pytest.param(port, task, executor, asked, id=f"{pipeline}-{task['taskInfo']['name']}")


STEPS = list(every_step())
each_step = pytest.mark.parametrize(("port", "task", "executor", "asked"), STEPS)
each_pipeline = pytest.mark.parametrize("pipeline", PIPELINES)


def channel(name):
    return "{{$.inputs.parameters['pipelinechannel--" + name + "']}}"


@each_pipeline
def test_the_spec_and_its_platform_part_are_what_kubeflow_has_declared(pipeline):
    from kfp import components

    spec, platform = documents(pipeline)
    parsed = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())  # refuses a field that it does not know
    assert parsed.pipeline_info.name == pipeline
    for asked in platform["deploymentSpec"]["executors"].values():
        json_format.ParseDict(asked, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    assert components.load_component_from_file(str(recipe.pipeline_file(pipeline))).name == pipeline


@each_pipeline
def test_every_input_that_a_group_hands_to_a_step_is_handed_to_the_group(pipeline):
    spec, platform = documents(pipeline)
    wanted = set()
    for name, component, dag in dags(spec):
        handed_in = set(component.get("inputDefinitions", {}).get("parameters", {}))
        for task in dag["tasks"].values():
            for value in task.get("inputs", {}).get("parameters", {}).values():
                if "componentInputParameter" in value:
                    assert value["componentInputParameter"] in handed_in, f"{name} has no such input"
        wanted |= handed_in if name != "root" else set()
    for asked in platform["deploymentSpec"]["executors"].values():
        found = re.findall(r"'componentInputParameter': '([^']+)'", str(asked))
        assert set(found) <= wanted


def test_there_are_steps_to_look_at():
    assert len(STEPS) > 40
    assert {port for port, *_ in (step.values for step in STEPS)} >= {"begin", "finish", "train", "gate", "promote"}


@each_step
def test_no_step_is_without_limits_of_processor_memory_disk_and_time(port, task, executor, asked):
    prefix = "resources_light_" if port in LIGHT else "resources_"
    resources = executor["resources"]
    assert resources["resourceCpuLimit"] == channel(prefix + "cpu")
    assert resources["resourceCpuRequest"] == ("200m" if port in LIGHT else channel("resources_cpu"))
    assert resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"] == channel(prefix + "memory")
    mounts = {mount["mountPath"]: mount for mount in asked["emptyDirMounts"]}
    assert mounts["/tmp"]["sizeLimit"] == ("50Gi" if port in LIGHT else "200Gi")
    assert asked["activeDeadlineSeconds"] == str(3600 if port in LIGHT else 24 * 3600)
    assert mounts.get("/dev/shm", {}).get("medium") == (None if port in LIGHT else "Memory")


@each_step
def test_a_step_asks_for_gpus_by_parameter_if_it_can_use_them_and_else_for_none(port, task, executor, asked):
    if port in ON_THE_PROCESSOR:
        assert "accelerator" not in executor["resources"]
        assert "tolerations" not in asked and "nodeSelector" not in asked
        return
    assert executor["resources"]["accelerator"] == {
        "resourceType": channel("resources_gpu_type"), "resourceCount": channel("resources_gpus"),
    }  # fmt: skip
    assert asked["tolerations"] == [
        {"tolerationJson": {"componentInputParameter": "pipelinechannel--resources_tolerations"}}
    ]
    assert asked["nodeSelector"] == {
        "nodeSelectorJson": {"componentInputParameter": "pipelinechannel--resources_node_selector"}
    }


@each_step
def test_a_step_runs_as_nobody_and_its_lost_pod_is_replaced_twice(port, task, executor, asked):
    assert asked["securityContext"] == {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}
    assert asked["imagePullPolicy"] == "IfNotPresent"
    assert asked["podMetadata"] == {"labels": {"app.kubernetes.io/part-of": "slimline"}}
    assert task["retryPolicy"] == {
        "maxRetryCount": 2, "backoffDuration": "30s", "backoffFactor": 2.0, "backoffMaxDuration": "300s",
    }  # fmt: skip


@each_step
def test_addresses_and_passwords_come_from_the_namespace_and_may_be_missing(port, task, executor, asked):
    (config,) = asked["configMapAsEnv"]
    secrets = {secret["secretName"]: secret for secret in asked["secretAsEnv"]}
    assert config["configMapName"] == "slimline" and config["optional"]
    assert {key["envVar"] for key in config["keyToEnv"]} == {
        "MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "AWS_DEFAULT_REGION", "SLIMLINE_MLFLOW_URL",
    }  # fmt: skip
    assert all(secret["optional"] for secret in secrets.values())
    assert set(secrets) == {"slimline-mlflow", "slimline-s3"} | ({"slimline-webhook"} if port == "finish" else set())
    assert secrets["slimline-mlflow"]["keyToEnv"] == [
        {"secretKey": "username", "envVar": "MLFLOW_TRACKING_USERNAME"},
        {"secretKey": "password", "envVar": "MLFLOW_TRACKING_PASSWORD"},
    ]


@each_step
def test_a_step_learns_which_run_it_belongs_to_from_its_pod(port, task, executor, asked):
    assert {field["name"]: field["fieldPath"] for field in asked["fieldPathAsEnv"]} == {
        "SLIMLINE_PIPELINE_RUN": "metadata.labels['pipeline/runid']", "SLIMLINE_NAMESPACE": "metadata.namespace",
    }  # fmt: skip
    variable, told = executor["env"]
    assert told == {"name": "SLIMLINE_PROGRESS", "value": "/dev/stdout"}
    assert variable["name"] == "SLIMLINE_PIPELINE" and variable["value"] in PIPELINES
    assert "{{" not in str(executor["env"])  # a cluster puts nothing in the place of a placeholder there


@each_pipeline
def test_every_pipeline_begins_and_ends_around_all_of_its_steps(pipeline):
    tasks = documents(pipeline)[0]["root"]["dag"]["tasks"]
    assert set(tasks) == {"exit-handler-1", "finish"}
    assert tasks["exit-handler-1"]["taskInfo"]["name"] == pipeline
    assert tasks["finish"]["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert tasks["finish"]["inputs"]["parameters"]["status"] == {"taskFinalStatus": {"producerTask": "exit-handler-1"}}
    inner = documents(pipeline)[0]["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert [name for name, task in inner.items() if not task.get("dependentTasks")] == ["begin"]


@each_pipeline
def test_the_beginning_is_given_every_parameter_as_it_is(pipeline):
    spec, _ = documents(pipeline)
    given = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]["begin"]["inputs"]["parameters"]
    for name, definition in parameters(pipeline).items():
        assert given[name] == {"componentInputParameter": f"pipelinechannel--{name}"}
        taken = spec["components"]["comp-begin"]["inputDefinitions"]["parameters"][name]
        assert taken["parameterType"] == definition["parameterType"]


@each_pipeline
def test_every_step_has_a_name_of_its_own_that_reads_well(pipeline):
    names = [task["taskInfo"]["name"] for _, task, _ in leaves(documents(pipeline)[0])]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in names), names


@each_pipeline
def test_every_parameter_has_a_default_and_a_sentence(pipeline):
    for name, definition in parameters(pipeline).items():
        assert "defaultValue" in definition, name
        assert len(definition["description"]) > 15 and definition["description"].endswith("."), name
        assert "\n" not in definition["description"], name
        if definition["defaultValue"] == "":
            assert name in (*recipe.REQUIRED, "reason"), f"{name} is empty, and nothing asks for it"


@each_pipeline
def test_every_method_names_the_values_that_it_may_have(pipeline):
    for name, definition in parameters(pipeline).items():
        if not name.endswith("_method"):
            continue
        stage = {"rotate": "quantize"}.get(name.removesuffix("_method"), name.removesuffix("_method"))
        allowed = definition["description"].split(". ")[1].rstrip(".")
        for method in re.split(r", (?:or )?", allowed):
            method = method.split(" if ")[0].split(" ")[0]
            assert method == "none" or f"{stage}.{method}" in technique.all_names(), f"{name}: {method}"
        assert definition["defaultValue"] in allowed


@each_pipeline
def test_a_parameter_is_called_after_its_step_so_that_an_alphabetical_form_has_groups(pipeline):
    steps = [task["taskInfo"]["name"] for _, task, _ in leaves(documents(pipeline)[0])]
    for name in set(parameters(pipeline)) - ALONE:
        group = name.split("_")[0]
        assert group == "resources" or any(f"{step}-".startswith(f"{group}-") for step in steps), name


@each_pipeline
def test_what_is_asked_of_the_cluster_is_text_as_it_reads_no_number_there(pipeline):
    kinds = {name: d["parameterType"] for name, d in parameters(pipeline).items() if name.startswith("resources_")}
    assert kinds.pop("resources_tolerations") == "LIST" and kinds.pop("resources_node_selector") == "STRUCT"
    assert set(kinds.values()) == {"STRING"} and len(kinds) == 6


@each_pipeline
def test_every_step_that_measures_shows_its_numbers(pipeline):
    spec, _ = documents(pipeline)
    shown = {}
    for port, task, _ in leaves(spec):
        outputs = spec["components"][task["componentRef"]["name"]].get("outputDefinitions", {}).get("artifacts", {})
        shown[port] = {output["artifactType"]["schemaTitle"] for output in outputs.values()}
    for port, kinds in shown.items():
        if port.startswith(MEASURING):
            assert "system.Metrics" in kinds, port
    assert shown["begin"] == shown["finish"] == {"system.Markdown"}
    if "evaluate-quality" in shown:
        assert "system.ClassificationMetrics" in shown["evaluate-quality"]
    if "report" in shown:
        assert shown["report"] == {"system.HTML"}


def test_on_one_machine_nothing_is_tried_again_and_the_rest_is_as_compiled(tmp_path):
    spec, _ = documents("engine")
    made = yaml.safe_load(launch.for_one_machine(spec, tmp_path / "here.yaml").read_text())
    assert all("retryPolicy" not in task for _, task, _ in leaves(made))
    assert all("retryPolicy" in task for _, task, _ in leaves(spec))
    assert made["deploymentSpec"] == spec["deploymentSpec"]


@each_pipeline
def test_the_values_of_a_run_reach_the_steps_inside_the_group(pipeline):
    spec, _ = documents(pipeline)
    values = {name: d["defaultValue"] for name, d in parameters(pipeline).items()}
    what = "source" if "source" in values else "name"
    changed = values | {what: "here", "resources_memory": "9Gi", "resources_light_memory": "9Gi"}
    given = {step.name: step.given for step in recipe.steps(spec, changed)}
    given |= {"fetch": given["plan"]} if "plan" in given else {}
    first = next(given[name] for name in ("fetch", "fetch-language", "rollback", "plan") if name in given)
    assert first[what] == "here"
    assert "9Gi" in (
        first.get("pipelinechannel--resources_memory"),
        first.get("pipelinechannel--resources_light_memory"),
    )
    assert len(list(recipe.steps(spec, values))) == len(list(leaves(spec)))
