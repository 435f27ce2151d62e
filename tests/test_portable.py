"""What means one thing here and another on a cluster: found in compiled pipelines, and what kfp.local does, run."""

import importlib.util
import json
import linecache
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from kfp import compiler
from kfp.dsl import pipeline_context
from rich.console import Console

from slimline import errors, launch, portable, recipe, view
from tests.kubeflow import IMAGE, small

HEAD = """
from kfp import dsl
from functools import partial
port = partial(dsl.component, base_image="slimline-cpu:0.1.0", install_kfp_package=False)

@port
def made(n: int = 1) -> str:
    return str(n)

@port
def reads(data: dsl.Input[dsl.Dataset]) -> str:
    return data.uri

@port
def writes(data: dsl.Output[dsl.Dataset]):
    open(data.path, "w").write("x")

@port
def last(status: dsl.PipelineTaskFinalStatus):
    print(status.state)
"""


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compile the body of a pipeline with kfp itself, without our checks."""

    def compile(body: str, more: str = "", arguments: str = "") -> portable.Compiled:
        source = tmp_path / "pipelines" / "tried.py"
        source.parent.mkdir(exist_ok=True)
        function = (
            f"@dsl.pipeline(name='tried')\ndef tried({arguments}):\n{textwrap.indent(textwrap.dedent(body), '    ')}"
        )
        source.write_text(f"{HEAD}\n{textwrap.dedent(more)}\n{function}\n")
        linecache.checkcache()
        monkeypatch.setattr(pipeline_context.Pipeline, "_execution_caching_default", False)  # as in our own compile
        spec = importlib.util.spec_from_file_location("tried", source)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "tried", module)
        spec.loader.exec_module(module)
        compiler.Compiler().compile(module.tried, str(tmp_path / "tried.yaml"))
        return portable.read(tmp_path / "tried.yaml")

    return compile


@pytest.mark.parametrize(
    ("body", "arguments", "sentence"),
    [
        ("i = dsl.importer('runs:/abc/model', dsl.Dataset)\nreads(data=i.output)", "",
         "importer imports 'runs:/abc/model', which a later step reads as an artifact, and a cluster opens only s3://"),
        ("i = dsl.importer('/here/data.csv', dsl.Dataset)\nreads(data=i.output)", "", "imports '/here/data.csv'"),
        ("i = dsl.importer('s3://other/data.csv', dsl.Dataset)\nreads(data=i.output)", "",
         "from another bucket than the cluster's own (unknown here), whose credentials it lacks"),
        ("i = dsl.importer(uri, dsl.Dataset)\nreads(data=i.output)", "uri: str = 'models:/a/1'",
         "imports 'models:/a/1'"),
        ("with dsl.ExitHandler(last()):\n    i = dsl.importer(uri, dsl.Dataset)\n    reads(data=i.output)",
         "uri: str = 'runs:/abc/x'", "exit-handler-1/importer imports 'runs:/abc/x'"),
        ("reads(data=given)", "given: dsl.Input[dsl.Dataset]", "given is an artifact that the pipeline itself takes"),
    ],
)  # fmt: skip
def test_an_artifact_at_an_address_that_a_cluster_cannot_open_is_refused(compiled, body, arguments, sentence):
    pipeline = compiled(body, arguments=arguments)
    found = portable.errors(pipeline)
    assert len(found) == 1 and sentence in found[0], found
    with pytest.raises(errors.ConfigError, match="tried.yaml: "):
        portable.require(pipeline, "tried.yaml")


def test_an_address_is_fine_where_nothing_reads_it_or_the_cluster_has_the_bucket_or_it_is_a_ref(compiled):
    assert portable.errors(compiled("dsl.importer('runs:/abc/model', dsl.Dataset)")) == []
    imported = compiled("i = dsl.importer(uri, dsl.Dataset)\nreads(data=i.output)", arguments="uri: str")
    assert portable.errors(imported) == []  # it is not known yet
    assert portable.errors(imported, {"uri": "s3://ours/x"}, "s3://ours/artifacts") == []
    assert (
        "another bucket than the cluster's own (ours)" in portable.errors(imported, {"uri": "s3://b/x"}, "s3://ours")[0]
    )
    assert "imports 'runs:/a/b'" in portable.errors(imported, {"uri": "runs:/a/b"})[0]
    assert portable.errors(compiled("w = writes()\nreads(data=w.output)")) == []


def test_container_components_and_their_placeholders_are_refused(compiled):
    more = """
    @dsl.container_component
    def shell(name: str, extra: str = None):
        return dsl.ContainerSpec(image="alpine:3", command=["echo"], args=[
            dsl.ConcatPlaceholder(["a", name]), dsl.IfPresentPlaceholder(input_name="extra", then=["-x", extra])])

    @dsl.component(base_image="python:3.11", target_image="registry.example.com/ours:1")
    def packed() -> str:
        return "a"
    """
    found = portable.errors(compiled("shell(name='b')\npacked()", more))
    assert any(
        "step shell is a container component, with Concat and IfPresent, which only a cluster runs" in f for f in found
    )
    assert any("step packed is a containerized Python component" in f for f in found), found


def test_packages_that_are_installed_when_a_step_starts_are_refused(compiled):
    more = """
    @dsl.component(base_image="python:3.11", packages_to_install=["pandas==2.3.0"])
    def loose() -> str:
        return "a"
    """
    (found,) = portable.errors(compiled("loose()", more))
    assert "step loose installs packages when it starts (" in found and "pandas==2.3.0" in found


@pytest.mark.slow
def test_a_condition_on_a_named_output_is_refused_as_this_machine_never_takes_it_for_true(compiled, tmp_path):
    more = """
    from typing import NamedTuple

    @port
    def asks(name: str) -> NamedTuple("Answer", [("%s", str)]):
        return ("yes",)

    @port
    def counts(place: str) -> str:
        open(place, "a").write("x")
        return "a"
    """
    place = tmp_path / "count"
    body = f"with dsl.If(asks(name='a').outputs['%s'] == 'yes'):\n    counts(place={str(place)!r})"
    named = compiled(body % "due", more % "due")
    run_locally(tmp_path)
    assert not place.exists(), "kfp.local has learnt it: the lint may forget it"
    (found,) = portable.errors(named)
    assert "whether condition-1 runs hangs on the output due of asks" in found
    assert portable.errors(compiled(body % "Output", more % "Output")) == []
    run_locally(tmp_path)
    assert place.read_text() == "x"


def test_what_this_machine_leaves_out_is_noted_and_is_no_error(compiled):
    pipeline = compiled(
        """
        a = made(n=1).set_caching_options(True)
        b = made(n=2).set_memory_limit("1G").set_cpu_limit("2").set_accelerator_type("nvidia.com/gpu")
        b.set_accelerator_limit(1)
        """
    )
    assert portable.errors(pipeline) == []
    assert portable.notes(pipeline) == [
        "Kubeflow's own cache is not used here: made.",
        "CPU requests and limits do nothing here: made-2.",
        "memory requests and limits do nothing here: made-2.",
        "GPU requests and limits do nothing here: made-2.",
    ]
    assert not any("memory" in note for note in portable.notes(pipeline, containers=True))  # an engine keeps those
    platform = {"deploymentSpec": {"executors": {"exec-made": {"tolerations": [], "secretAsEnv": []}}}}
    assert portable.notes(pipeline._replace(platform=platform))[-1] == (
        "settings for Kubernetes do nothing here: made (secretAsEnv, tolerations)."
    )


def test_the_pipelines_that_come_along_mean_the_same_on_a_cluster():
    for name in recipe.pipelines():
        assert portable.errors(portable.read(recipe.pipeline_file(name))) == [], name


def test_compile_refuses_and_leaves_no_file(tmp_path, compiled):
    compiled("i = dsl.importer('runs:/abc/model', dsl.Dataset)\nreads(data=i.output)")
    with pytest.raises(errors.ConfigError, match=r"tried\.py: importer imports 'runs:/abc/model'"):
        launch.compile(str(tmp_path / "pipelines" / "tried.py"), tmp_path / "out.yaml")
    assert not (tmp_path / "out.yaml").exists()


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        ("slimline-cpu:0.1.0", "step say of p runs in slimline-cpu:0.1.0, which no registry is named for"),
        ("team/slimline-cpu:0.1.0", "which no registry is named for"),
        ("registry.example.com/slimline-cpu:0.0.9", "p was compiled for slimline 0.0.9"),
        ("registry.example.com/slimline-cpu:latest", "which may be another image tomorrow"),
        ("registry.example.com/other", "which may be another image tomorrow"),
        (f"registry.example.com/slimline-cpu@sha256:{'1' * 64}", "which is not among the images in"),
    ],
)
def test_an_image_that_the_cluster_cannot_have_or_has_anew_is_refused(tmp_path, image, sentence):
    images = tmp_path / "images.json"
    images.write_text(json.dumps({"slimline-cpu:0.1.0": f"registry.example.com/slimline-cpu@sha256:{'2' * 64}"}))
    with pytest.raises(errors.ConfigError, match="Compile it again|Push the images|by digest") as caught:
        portable.require_images(portable.read(small(tmp_path, image=image)), "p", images)
    assert sentence in str(caught.value)


def test_an_image_with_a_registry_and_this_version_is_fine_and_names_are_replaced_by_what_was_built(tmp_path):
    for image in (IMAGE, f"localhost:5000/slimline-cpu@sha256:{'1' * 64}", "registry.example.com/other:1.2"):
        portable.require_images(portable.read(small(tmp_path, image=image)), "p")
    images = tmp_path / "images.json"
    images.write_text(json.dumps({"slimline-cpu:0.1.0": IMAGE}))
    text = portable.with_images(small(tmp_path, image="slimline-cpu:0.1.0").read_text(), images, "p")
    assert portable.parse(text, "p").spec["deploymentSpec"]["executors"]["exec-say"]["container"]["image"] == IMAGE
    images.write_text("{}")
    with pytest.raises(errors.ConfigError, match="has no slimline-cpu:0.1.0, which a step of p runs in"):
        portable.with_images(small(tmp_path, image="slimline-cpu:0.1.0").read_text(), images, "p")


def test_a_pipeline_of_a_newer_kfp_than_the_clusters_is_refused(tmp_path):
    newer = portable.read(small(tmp_path, sdk="kfp-2.17.0"))
    with pytest.raises(
        errors.ConfigError, match=r"compiled by kfp 2\.17, but the cluster runs Kubeflow Pipelines 2\.14"
    ):
        portable.require_cluster(newer, "p", "2.14.3")
    for server in ("2.17.0", "2.18.1", "3.0.0", "unknown", ""):
        portable.require_cluster(newer, "p", server)


def test_a_file_of_this_machine_is_refused_unless_the_steps_have_its_folder(tmp_path):
    here = tmp_path / "data.csv"
    here.touch()
    for value in ("data.csv", "./data.csv", str(here)):
        with pytest.raises(errors.DataError, match="is on this machine, where a step on the cluster does not see it"):
            portable.require_reachable({"data": value})
    portable.require_reachable({"data": str(here)}, (str(tmp_path),))
    portable.require_reachable({"data": "s3://b/x.csv", "source": "models:/a@champion", "task": "", "name": "data.csv"})
    portable.require_reachable({"data": "/on/the/cluster/alone.csv"})


@pytest.mark.parametrize("text", ["", "a: [", "a: 1", "- 1", "pipelineInfo: {name: x}"])
def test_what_is_no_compiled_pipeline_is_said(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(errors.ConfigError, match=r"p\.yaml is not a compiled pipeline"):
        portable.read(tmp_path / "p.yaml")


# What kfp.local 2.17 does by itself, in a process of its own: the reasons for the rules above.
LOCAL = """
import sys, tempfile
from pathlib import Path
from kfp import components, dsl, local
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[2], raise_on_error=False)
components.load_component_from_file(sys.argv[1])()
"""


def run_locally(folder: Path) -> str:
    code = [sys.executable, "-c", LOCAL, str(folder / "tried.yaml"), str(folder / "root")]
    done = subprocess.run(code, capture_output=True, text=True, cwd=folder)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_retries_exit_handlers_loops_and_collected_results_are_the_same_here(compiled, tmp_path):
    more = """
    @port
    def second_time(place: str) -> str:
        import pathlib
        seen = pathlib.Path(place)
        if not seen.exists():
            seen.touch()
            raise SystemExit(1)
        return "done at the second try"

    @port
    def total(found: list) -> str:
        print(f"collected {sorted(found)}")
        return str(len(found))

    @port
    def fails():
        raise SystemExit(1)
    """
    body = f"""
    with dsl.ExitHandler(last()):
        second_time(place={str(tmp_path / "seen")!r}).set_retry(1)
        with dsl.ParallelFor([1, 2, 3]) as n:
            one = made(n=n)
        total(found=dsl.Collected(one.output))
        fails()
    """
    assert portable.errors(compiled(body, more)) == []
    said = run_locally(tmp_path)
    assert "done at the second try" in said and "collected ['1', '2', '3']" in said
    assert "FAILED" in said  # what the exit handler was told


@pytest.mark.slow
def test_an_import_from_a_store_that_no_cluster_opens_is_taken_here(compiled, tmp_path):
    pipeline = compiled("i = dsl.importer('runs:/abc/model', dsl.Dataset)\nreads(data=i.output)")
    said = run_locally(tmp_path)
    assert "runs:/abc/model" in said and "SUCCESS" in said and "FAILURE" not in said
    assert portable.errors(pipeline)


@pytest.mark.slow
def test_a_container_component_is_refused_here_and_a_cache_is_not_used(compiled, tmp_path):
    more = """
    @dsl.container_component
    def shell():
        return dsl.ContainerSpec(image="python:3.11", command=["echo", "a"])

    @port
    def counts(place: str) -> str:
        with open(place, "a") as handle:
            handle.write("x")
        return "a"
    """
    place = tmp_path / "count"
    compiled(f"counts(place={str(place)!r}).set_caching_options(True)", more)
    run_locally(tmp_path)
    run_locally(tmp_path)
    assert place.read_text() == "xx"
    compiled("shell()", more)
    assert "only supports running Lightweight Python Components" in run_locally(tmp_path)


def test_a_run_here_tells_what_it_leaves_out_before_its_first_step(
    compiled, fresh_store, tmp_path, monkeypatch, capsys
):
    compiled("made(n=2).set_cpu_limit('2')")
    events, at_work = [], []
    monkeypatch.setattr(launch, "_warm_up", lambda: None)
    monkeypatch.setattr(launch, "_execute", lambda *given: at_work.extend(events))
    launch.run(str(tmp_path / "tried.yaml"), {}, events.append, "slimline run tried.yaml")
    (note,) = [event for event in at_work if event["event"] == "note"]
    assert note["text"] == "CPU requests and limits do nothing here: made."
    view.View(Console()).on_event(note)
    assert "note: CPU requests and limits do nothing here: made." in capsys.readouterr().out


def test_a_cache_is_mounted_in_every_step_and_nothing_else_changes(tmp_path):
    from kfp import components

    plain, out = portable.read(recipe.pipeline_file("optimize")), tmp_path / "cached.yaml"
    launch.compile("optimize", out, cache="slimline-cache")
    cached = portable.read(out)
    components.load_component_from_file(str(out))
    executors = cached.platform["deploymentSpec"]["executors"]
    assert set(executors) == set(cached.spec["deploymentSpec"]["executors"])
    for label, asked in executors.items():
        (mount,) = asked.pop("pvcMount")
        assert (mount["constant"], mount["mountPath"]) == ("slimline-cache", "/cache")
        told = cached.spec["deploymentSpec"]["executors"][label]["container"]["env"].pop()
        assert told == {"name": "SLIMLINE_STORE", "value": "/cache"}
    assert (cached.spec, cached.platform) == (plain.spec, plain.platform)
    with pytest.raises(errors.ConfigError, match="'Not A Claim' is no name of a PersistentVolumeClaim"):
        launch.compile("optimize", out, cache="Not A Claim")
