"""What every pipeline has around its steps on a cluster: a beginning, an end, and what each step asks for.

    @dsl.pipeline(name="optimize", ...)
    @on_cluster
    def optimize(...): ...

`begin` opens the run in MLflow and refuses a recipe that cannot work; `finish` closes it, however the steps ended.
Every step gets processor, memory and disk with a limit, a time limit, retries for lost pods, a user that is not root,
and the addresses and passwords that the namespace holds. What a person may want to change is a parameter. On one
machine all of it is left aside, but the memory of a container (launch.py).
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl import component_factory, pipeline_context, python_component

from components.outcome import begin, finish

LIGHT = (
    "begin", "finish", "plan", "champion", "champion-language", "gate", "gate-language", "register", "promote",
    "promote-language", "rollback", "report",
)  # fmt: skip
"""Steps that judge and write down. All others work on weights."""
ON_THE_PROCESSOR = (*LIGHT, "fetch", "fetch-language", "export", "export-language")
"""Steps that have no use for a GPU."""

HOUR = 3600
TIME_LIMIT = {"light": HOUR, "heavy": 24 * HOUR}
SCRATCH = {"light": "50Gi", "heavy": "200Gi"}
"""What a step may put into /tmp: fetched models, results before they are saved. More, and the step is evicted."""
RETRIES, PAUSE_S, LONGEST_PAUSE_S = 2, 30, 300
NOBODY = 10001
"""The user of the images (docker/Dockerfile)."""

SETTINGS = ("MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "AWS_DEFAULT_REGION", "SLIMLINE_MLFLOW_URL")
"""Keys of the ConfigMap `slimline`."""
SECRETS = {
    "slimline-mlflow": {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"},
    "slimline-s3": {"AWS_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY"},
}
WEBHOOK = {"slimline-webhook": {"url": "SLIMLINE_WEBHOOK"}}
"""Of `finish` alone. All of these may be missing."""
POD = {"SLIMLINE_PIPELINE_RUN": "metadata.labels['pipeline/runid']", "SLIMLINE_NAMESPACE": "metadata.namespace"}
"""What a step learns of the run that it belongs to. KFP puts nothing in the place of a placeholder in env."""


def asks(
    resources_cpu: str = "4",
    resources_gpu_type: str = "nvidia.com/gpu",
    resources_gpus: str = "0",
    resources_light_cpu: str = "1",
    resources_light_memory: str = "4Gi",
    resources_memory: str = "16Gi",
    resources_node_selector: dict = {},
    resources_tolerations: list = [],
) -> None:
    """What steps ask a cluster for. Text even where it is a number: KFP 2.17 reads a number here as nothing.

    Args:
        resources_cpu: Processors of a step that works on weights, as Kubernetes writes it. 4, or 500m.
        resources_gpu_type: Name of the GPU resource. nvidia.com/gpu, nvidia.com/mig-1g.10gb, amd.com/gpu.
        resources_gpus: GPUs of a step that works on weights and can use one. 0, 1 or more.
        resources_light_cpu: Processors of a step that judges, registers or reports. 1, or 500m.
        resources_light_memory: Memory of such a step, which loads the model to see that it answers. 4Gi or more.
        resources_memory: Memory of a step that works on weights. 16Gi or more; /dev/shm counts.
        resources_node_selector: Labels of the nodes for steps with GPUs, such as {"pool": "gpu"}. {} for any.
        resources_tolerations: Taints that such steps bear, like [{"key": "gpu", "operator": "Exists"}]. [] for none.
    """


def on_cluster(pipeline: Callable[..., Any]) -> Callable[..., Any]:
    """The pipeline with its beginning, its end, the parameters of `asks`, and what they say set on every step."""
    own, more = (inspect.signature(f).parameters for f in (pipeline, asks))
    name = pipeline.__name__

    @functools.wraps(pipeline)
    def around(*channels: Any) -> None:
        given = dict(zip([*own, *more], channels, strict=True))
        finished = finish(pipeline=name).set_display_name("finish")
        with dsl.ExitHandler(finished, name=name):
            began = _beginning(around)(pipeline=name, **given).set_display_name("begin")
            pipeline(**{key: given[key] for key in own})
        for task in pipeline_context.Pipeline.get_default_pipeline().tasks.values():
            if task not in (began, finished) and not any(channel.task_name for channel in task.channel_inputs):
                task.after(began)
            _equip(task, name, {key: given[key] for key in more})

    around.__signature__ = inspect.Signature([*own.values(), *more.values()])  # type: ignore[attr-defined]
    around.__doc__ = inspect.getdoc(pipeline) + _arguments(asks)  # type: ignore[operator]
    return around


def inside(pipeline: Any) -> Callable[..., Any]:
    """The steps of a pipeline without what is around them, to stand in another one."""
    steps: Callable[..., Any] = pipeline.pipeline_func.__wrapped__
    return steps


def _beginning(pipeline: Callable[..., Any]) -> python_component.PythonComponent:
    """`begin`, taking all of the pipeline's parameters too, each with its type: `outcome.given` reads them.

    In a mapping or a text, a placeholder would be filled in without escapes on a cluster, and spoil the JSON around it.
    """
    spec = copy.deepcopy(begin.component_spec)
    spec.inputs |= component_factory.extract_component_interface(pipeline).inputs or {}
    return python_component.PythonComponent(component_spec=spec, python_func=begin.python_func)


def _equip(task: dsl.PipelineTask, pipeline: str, given: dict[str, Any]) -> None:
    step = task.component_spec.name
    light = step in LIGHT
    weight = "light" if light else "heavy"
    if not task._task_spec.display_name:
        task.set_display_name(step.removesuffix("-language").removeprefix("evaluate-"))
    prefix = "resources_light_" if light else "resources_"
    cpu, memory = given[prefix + "cpu"], given[prefix + "memory"]
    # Said to the group around the step too, which else would not hand them in.
    task.register_pipeline_channels(list(given.values()))
    task.set_cpu_limit(cpu).set_cpu_request("200m" if light else cpu)
    task.set_memory_limit(memory).set_memory_request(memory)
    if step not in ON_THE_PROCESSOR:
        task.set_accelerator_type(given["resources_gpu_type"]).set_accelerator_limit(given["resources_gpus"])
        kubernetes.add_node_selector_json(task, given["resources_node_selector"])
        kubernetes.add_toleration_json(task, given["resources_tolerations"])
    if not light:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory")
    kubernetes.empty_dir_mount(task, "scratch", "/tmp", size_limit=SCRATCH[weight])
    kubernetes.set_timeout(task, TIME_LIMIT[weight])
    task.set_retry(RETRIES, f"{PAUSE_S}s", 2.0, f"{LONGEST_PAUSE_S}s")
    kubernetes.set_security_context(task, run_as_user=NOBODY, run_as_group=NOBODY, run_as_non_root=True)
    kubernetes.set_image_pull_policy(task, "IfNotPresent")
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "slimline")
    task.set_env_variable("SLIMLINE_PIPELINE", pipeline)
    task.set_env_variable("SLIMLINE_PROGRESS", "/dev/stdout")  # where `slimline wait` and `logs` find it
    for variable, field in POD.items():
        kubernetes.use_field_path_as_env(task, variable, field)
    kubernetes.use_config_map_as_env(task, "slimline", {key: key for key in SETTINGS}, optional=True)
    for secret, keys in (SECRETS | (WEBHOOK if step == "finish" else {})).items():
        kubernetes.use_secret_as_env(task, secret, keys, optional=True)


def _arguments(function: Callable[..., Any]) -> str:
    """The lines under `Args:`, to go below another function's."""
    return "\n" + str(inspect.getdoc(function)).partition("Args:\n")[2]
