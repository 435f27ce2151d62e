"""What means one thing on this machine and another on a cluster, found in a compiled pipeline before it runs anywhere.

kfp.local takes what a cluster does not (an artifact at `runs:/...`, an image that only this machine has), leaves out
what a cluster does (caching, limits, tolerations, secrets), and refuses what a cluster takes (container components).
`compile` and `submit` refuse such pipelines; `run` says what it leaves out. What kfp.local 2.17 does the same, such
as retries, exit handlers and loops, is not mentioned: tests/test_portable.py runs it.
"""

# Long because every difference between the two has a place in the specification and a sentence of its own.
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml

from slimline import __version__
from slimline.errors import ConfigError, DataError
from slimline.recipe import FILES

EXECUTOR = "kfp.dsl.executor_main"
PLACEHOLDERS = ('{"Concat": ', '{"IfPresent": ')
BUCKETS = ("s3", "gs", "minio")
"""What a cluster's launcher can open, if it has the credentials."""

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""A compiled pipeline has thousands of lines, which the loader in Python takes a second for."""


class Compiled(NamedTuple):
    """A compiled pipeline: its text, its specification, and its settings for Kubernetes if it has any."""

    name: str
    text: str
    spec: dict[str, Any]
    platform: dict[str, Any]


class Task(NamedTuple):
    """A task at any depth: where it is, what it says, what it runs, the tasks beside it and the parameters it sees."""

    path: str
    task: dict[str, Any]
    component: dict[str, Any]
    dag: dict[str, Any]
    scope: dict[str, Any]


def read(file: Path) -> Compiled:
    """The documents of a compiled pipeline. Raises ConfigError for what is not one."""
    return parse(file.read_text(encoding="utf-8"), str(file))


def parse(text: str, name: str) -> Compiled:
    """The same, of a text that came from a file of this name."""
    try:
        documents = [document for document in yaml.load_all(text, Loader=LOADER) if document]
        spec = documents[0]
        title = str(spec["pipelineInfo"]["name"])
        spec["root"]["dag"]["tasks"], spec["deploymentSpec"]["executors"]
    except (yaml.YAMLError, IndexError, KeyError, TypeError):
        raise ConfigError(f"{name} is not a compiled pipeline. Write one with `slimline compile`.") from None
    platforms = documents[1]["platforms"]["kubernetes"] if len(documents) > 1 else {}
    return Compiled(title, text, spec, platforms)


def with_images(text: str, images: Path, pipeline: str) -> str:
    """The same pipeline with the images that `make images` has built in the place of local names."""
    if not images.is_file():
        raise ConfigError(f"{images} does not exist. `make images` writes build/images.json.")
    built = json.loads(images.read_text(encoding="utf-8"))
    for name in sorted(set(re.findall(r"^ +image: (slimline-\S+)$", text, re.MULTILINE))):
        if name not in built:
            raise ConfigError(f"{images} has no {name}, which a step of {pipeline} runs in. Build it: make images.")
        text = text.replace(f" image: {name}\n", f" image: {built[name]}\n")
    return text


CACHE = "/cache"
"""Where a volume that outlives a step is mounted: its SLIMLINE_STORE."""


def with_cache(text: str, claim: str) -> str:
    """The same pipeline with a PersistentVolumeClaim for what steps have fetched, and for work that was cut short.

    KFP 2.17 can take its name from a parameter, but not leave it out where that is empty: so it is compiled in.
    """
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", claim):
        raise ConfigError(f"{claim!r} is no name of a PersistentVolumeClaim. It has small letters, digits and dashes.")
    pipeline = parse(text, "the pipeline")
    asked = pipeline.platform.setdefault("deploymentSpec", {}).setdefault("executors", {})
    for label, executor in pipeline.spec["deploymentSpec"]["executors"].items():
        name = {"runtimeValue": {"constant": claim}}
        mount = {"constant": claim, "mountPath": CACHE, "pvcNameParameter": name}
        asked.setdefault(label, {}).setdefault("pvcMount", []).append(mount)
        executor["container"].setdefault("env", []).append({"name": "SLIMLINE_STORE", "value": CACHE})
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    documents = [pipeline.spec, {"platforms": {"kubernetes": pipeline.platform}}]
    return head + yaml.safe_dump_all(documents, sort_keys=True, explicit_start=False)


def errors(pipeline: Compiled, values: dict[str, Any] | None = None, root: str = "") -> list[str]:
    """Why this pipeline would not mean the same on a cluster, a sentence each; empty if it would.

    `values` are what it will run with, where that is known; `root` is the bucket that the cluster keeps artifacts in.
    """
    found = list(_container_only(pipeline.spec)) + list(_installs(pipeline.spec))
    found += _conditions(pipeline.spec)
    found += _addresses(pipeline.spec, values or {}, root or str(pipeline.spec.get("defaultPipelineRoot", "")))
    for name, artifact in pipeline.spec["root"].get("inputDefinitions", {}).get("artifacts", {}).items():
        if not artifact.get("isOptional"):
            found.append(
                f"{name} is an artifact that the pipeline itself takes, which nothing can hand to it on a cluster. "
                "Take a ref instead, as a str."
            )
    return found


def notes(pipeline: Compiled, containers: bool = False) -> list[str]:
    """What a cluster will do with this pipeline and a run on this machine does not."""
    said = []
    cached = [t.path for t in tasks(pipeline.spec) if t.task.get("cachingOptions", {}).get("enableCache")]
    if cached:
        said.append(f"Kubeflow's own cache is not used here: {_some(cached)}.")
    limited: dict[str, list[str]] = {"CPU": [], "memory": [], "GPU": []}
    for label, executor in _executors(pipeline.spec):
        resources = executor.get("container", {}).get("resources", {})
        for what, keys in RESOURCES.items():
            if any(key in resources for key in keys) and not (containers and what == "memory"):
                limited[what].append(label)
    for what, labels in limited.items():
        if labels:
            said.append(f"{what} requests and limits do nothing here: {_some(labels)}.")
    asked = pipeline.platform.get("deploymentSpec", {}).get("executors", {})
    if asked:
        labels = sorted(label.removeprefix("exec-") for label in asked)
        settings = sorted({key for settings in asked.values() for key in settings})
        said.append(f"settings for Kubernetes do nothing here: {_some(labels)} ({_some(settings)}).")
    return said


RESOURCES = {
    "CPU": ("cpuLimit", "cpuRequest", "resourceCpuLimit", "resourceCpuRequest"),
    "memory": ("memoryLimit", "memoryRequest", "resourceMemoryLimit", "resourceMemoryRequest"),
    "GPU": ("accelerator",),
}


def require(pipeline: Compiled, where: str, values: dict[str, Any] | None = None, root: str = "") -> None:
    """Raise ConfigError with the first reason why `where` does not mean the same here and on a cluster."""
    found = errors(pipeline, values, root)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ConfigError(f"{where}: {found[0]}{more}")


def require_images(pipeline: Compiled, where: str, images: Path | None = None, registry: bool = True) -> None:
    """Raise ConfigError if a cluster could not pull an image of this pipeline, or would get an older slimline's."""
    built = set(json.loads(images.read_text(encoding="utf-8")).values()) if images else None
    for label, executor in _executors(pipeline.spec):
        image = str(executor.get("container", {}).get("image", ""))
        if not image:
            continue
        version = version_of(image)
        if version and version != __version__:
            raise ConfigError(
                f"{where} was compiled for slimline {version} (step {label} runs in {image}), but this is "
                f"{__version__}. Compile it again: slimline compile, with --images build/images.json."
            )
        if registry and "@" not in image and image.rpartition("/")[2].partition(":")[2] in ("", "latest"):
            raise ConfigError(
                f"step {label} of {where} runs in {image}, which may be another image tomorrow. Name it by digest or "
                "by a version."
            )
        if registry and not has_registry(image):
            raise ConfigError(
                f"step {label} of {where} runs in {image}, which no registry is named for. Push the images (make "
                "images REGISTRY=...), then give --images build/images.json."
            )
        if built is not None and _is_ours(image) and image not in built:
            raise ConfigError(
                f"step {label} of {where} runs in {image}, which is not among the images in {images}. Compile it again "
                "with that file, or give the file of the cluster's images."
            )


def require_cluster(pipeline: Compiled, where: str, server: str) -> None:
    """Raise ConfigError if the pipeline was compiled by a newer kfp than the cluster understands."""
    compiled, runs = _minor(str(pipeline.spec.get("sdkVersion", "")).removeprefix("kfp-")), _minor(server)
    if compiled and runs and compiled > runs:
        raise ConfigError(
            f"{where} was compiled by kfp {_dotted(compiled)}, but the cluster runs Kubeflow Pipelines "
            f"{_dotted(runs)}. Compile it with kfp {_dotted(runs)}, or upgrade the cluster."
        )


def require_reachable(values: dict[str, Any], mounted: tuple[str, ...] = ()) -> None:
    """Raise DataError for a parameter that names a file of this machine; below `mounted`, the cluster has it, too."""
    for name in FILES:
        value = values.get(name)
        if not isinstance(value, str) or not value or ":" in value or any(_below(value, place) for place in mounted):
            continue
        if not value.startswith("/") or Path(value).exists():
            raise DataError(
                f"{name} {value!r} is on this machine, where a step on the cluster does not see it. Give a ref "
                "(s3://..., runs:/..., models:/...), or --mounted FOLDER for a volume that the steps have."
            )


def tasks(spec: dict[str, Any], values: dict[str, Any] | None = None) -> Iterator[Task]:
    """Every task of a pipeline, those inside loops, conditions and exit handlers too."""
    known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    scope = {name: definition.get("defaultValue") for name, definition in known.items()} | (values or {})
    yield from _tasks(spec, spec["root"]["dag"], scope, "")


def _tasks(spec: dict[str, Any], dag: dict[str, Any], scope: dict[str, Any], path: str) -> Iterator[Task]:
    for name, task in dag["tasks"].items():
        component = spec["components"][task["componentRef"]["name"]]
        here = f"{path}{name}"
        given = task.get("inputs", {}).get("parameters", {})
        inner = {key: _value(source, scope) for key, source in given.items()}
        yield Task(here, task, component, dag, inner)
        if "dag" in component:
            yield from _tasks(spec, component["dag"], inner, f"{here}/")


def _value(source: dict[str, Any], scope: dict[str, Any]) -> Any:
    if "componentInputParameter" in source:
        return scope.get(source["componentInputParameter"])
    return source.get("runtimeValue", {}).get("constant")


def _executors(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for label, executor in spec["deploymentSpec"]["executors"].items():
        yield label.removeprefix("exec-"), executor


def _container_only(spec: dict[str, Any]) -> Iterator[str]:
    for label, executor in _executors(spec):
        container = executor.get("container")
        if container is None:
            continue
        command = [str(part) for part in (*container.get("command", ()), *container.get("args", ()))]
        if not any(EXECUTOR in part for part in command):
            placeholders = [
                p[2:].partition('"')[0] for p in PLACEHOLDERS if any(part.startswith(p) for part in command)
            ]
            with_ = f", with {' and '.join(placeholders)}" if placeholders else ""
            yield (
                f"step {label} is a container component{with_}, which only a cluster runs. Write it as a Python "
                "component (components/_port.py)."
            )
        elif "--function_to_execute" not in command or container.get("command", [""])[0] != "sh":
            yield f"step {label} is a containerized Python component, which only a cluster runs. Write it as a port."


def _installs(spec: dict[str, Any]) -> Iterator[str]:
    for label, executor in _executors(spec):
        command = " ".join(map(str, executor.get("container", {}).get("command", ())[:3]))
        if "pip install" in command:
            packages = re.findall(r"'([^'\s]+)'", command.partition("pip install")[2])
            yield (
                f"step {label} installs packages when it starts ({_some(packages) or 'kfp'}): what runs then depends "
                "on the day and needs a network. Put them into its image and compile with install_kfp_package=False."
            )


def _conditions(spec: dict[str, Any]) -> Iterator[str]:
    """Conditions on a named output of a step, which kfp.local 2.17 takes for false without a word that is seen."""
    for task in tasks(spec):
        condition = str(task.task.get("triggerPolicy", {}).get("condition", ""))
        given = task.task.get("inputs", {}).get("parameters", {})
        for name in re.findall(r"parameter_values\['([^']+)'\]", condition):
            output = given.get(name, {}).get("taskOutputParameter", {})
            if output and output["outputParameterKey"] != "Output":
                yield (
                    f"whether {task.path} runs hangs on the output {output['outputParameterKey']} of "
                    f"{output['producerTask']}, which is never true on this machine. Call that output Output."
                )


def _addresses(spec: dict[str, Any], values: dict[str, Any], root: str) -> Iterator[str]:
    """Importers whose artifact a later step reads, at an address that a cluster cannot open."""
    for task in tasks(spec, values):
        importer = spec["deploymentSpec"]["executors"].get(task.component.get("executorLabel"), {}).get("importer")
        if importer is None or not _is_read(task.path.rpartition("/")[2], task.dag):
            continue
        uri = task.scope.get("uri") or importer.get("artifactUri", {}).get("constant")
        if not isinstance(uri, str):
            continue  # made by an earlier step, or given later
        scheme = urlsplit(uri).scheme
        if scheme not in BUCKETS:
            yield (
                f"{task.path} imports {uri!r}, which a later step reads as an artifact, and a cluster opens only "
                f"{', '.join(f'{name}://' for name in BUCKETS)}. Hand the ref to the step as a str, and let it fetch."
            )
        elif _bucket(uri) != _bucket(root):
            yield (
                f"{task.path} imports {uri!r}, which a later step reads as an artifact, from another bucket than the "
                f"cluster's own ({_bucket(root) or 'unknown here'}), whose credentials it lacks. Hand the ref to the "
                "step as a str, or name the bucket with --pipeline-root."
            )


def _is_read(name: str, dag: dict[str, Any]) -> bool:
    sources = [
        source.get("taskOutputArtifact", {}).get("producerTask")
        for task in dag["tasks"].values()
        for source in task.get("inputs", {}).get("artifacts", {}).values()
    ]
    outputs = dag.get("outputs", {}).get("artifacts", {})
    sources += [s.get("producerSubtask") for out in outputs.values() for s in out.get("artifactSelectors", ())]
    return name in sources


def version_of(image: str) -> str:
    """The version in the name of one of our images; empty for a digest, or for somebody else's image."""
    tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
    return tag if _is_ours(image) and re.fullmatch(r"\d+\.\d+\.\d+\S*", tag) else ""


def has_registry(image: str) -> bool:
    """Whether an image's name says where to pull it from, as Docker reads it: a first part with a dot or a port."""
    first, slash, _ = image.partition("/")
    return bool(slash) and ("." in first or ":" in first)


def _is_ours(image: str) -> bool:
    return image.partition("@")[0].rpartition("/")[2].startswith("slimline-")


def _bucket(uri: str) -> str:
    return urlsplit(uri).netloc


def _below(path: str, place: str) -> bool:
    return Path(path).is_relative_to(place)


def _minor(version: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
