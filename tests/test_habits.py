"""The rules of the house that no linter knows. Everything is found by looking, so that a new file is held to them."""

import ast
import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import slimline
from slimline import technique

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for folder in ("slimline", "components", "pipelines") for p in (ROOT / folder).rglob("*.py"))
LIBRARY = [p for p in SOURCES if p.is_relative_to(ROOT / "slimline")]
MODULES = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in LIBRARY]
TECHNIQUES = technique.all_names()
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "onnxscript", "sklearn", "pandas", "scipy"}
HEAVY |= {"tensorrt", "tensorrt_rtx"}
LONG = 250

# Imports everything it is told to and says what came of it, in a process that nothing else has touched.
PROBE = """
import importlib, json, logging, sys, threading, warnings
if len(sys.argv) > 2:
    import jinja2, numpy, pyarrow.parquet, psutil, pydantic, yaml  # what they do to us is not our doing
before = (list(logging.root.handlers), logging.root.level, list(warnings.filters), threading.active_count())
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    if len(sys.argv) > 2:
        after = (list(logging.root.handlers), logging.root.level, list(warnings.filters), threading.active_count())
        for what, a, b in zip(("handlers", "level", "filters", "threads"), before, after):
            if a != b:
                sys.exit(f"{name} changed the {what}: {a} -> {b}")
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def imported_by(*modules):
    """Top-level names of everything in memory after these modules were imported in a fresh process."""
    code = [sys.executable, "-c", PROBE, json.dumps(modules)]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def name_of(path):
    return str(path.relative_to(ROOT))


def nested_imports(path):
    """(module, line) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno


def top_level(tree):
    """Statements that run when the module is imported, inside if and try too, but not `if TYPE_CHECKING`."""
    for node in tree.body if isinstance(tree, ast.Module) else tree:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for branch in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from top_level(getattr(node, branch, []))


def test_there_is_something_to_look_at():
    assert len(TECHNIQUES) >= 2 and len(LIBRARY) > 10


def test_compiling_a_pipeline_imports_no_torch_and_no_mlflow():
    pipelines = [f"pipelines.{p.stem}" for p in (ROOT / "pipelines").glob("[!_]*.py")]
    assert not imported_by(*pipelines) & (HEAVY | {"mlflow", "slimline"})


def test_finding_every_technique_imports_nothing_heavy():
    assert not imported_by(*(f"slimline.{name}" for name in TECHNIQUES)) & (HEAVY | {"mlflow", "kfp"})


def test_the_command_line_starts_without_anything_heavy():
    assert not imported_by("slimline.cli") & (HEAVY | {"mlflow", "kfp"})


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_no_module_acts_when_it_is_imported(path):
    acts = (
        "logging.",
        "warnings.",
        "os.environ",
        "os.putenv",
        "signal.",
        "threading.",
        "print(",
        "random.seed",
        "torch.",
    )
    for node in top_level(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            said = ast.unparse(node)
            assert not said.startswith(acts) or f"{path.name}:{said}".startswith(ALLOWED_ACTS), (
                f"line {node.lineno}: {said}"
            )
        assert "os.environ[" not in ast.unparse(node).split("=")[0] or not isinstance(node, ast.Assign)


# MLflow reads these while it is imported, and has no other switch.
ALLOWED_ACTS = "store.py:os.environ.setdefault('MLFLOW_"


def test_importing_our_light_modules_leaves_logging_warnings_and_threads_alone():
    ours = [f"slimline.{name}" for name in ("errors", "artifact", "technique", "progress", "doctor", "recipe")]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(ours + [f"slimline.{n}" for n in TECHNIQUES]), "watch"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_says_what_it_is_and_what_it_costs(name):
    module = technique.find(name)
    assert module.__doc__ and len(module.__doc__.split()) >= 15, "a docstring says what, why and what it costs"
    assert isinstance(module.NEEDS, str) and isinstance(module.GIVES, str)
    assert issubclass(module.Config, technique.BaseConfig)
    assert list(module.run.__annotations__) == ["source", "out", "config", "return"]


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_option_has_a_meaning_and_every_number_a_bound(name):
    schema = technique.find(name).Config.model_json_schema()
    for option, field in schema.get("properties", {}).items():
        assert field.get("description"), f"{name}.{option} has no description"
        for kind in field.get("anyOf", [field]):
            if kind.get("type") in ("integer", "number"):
                bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum", "const"}
                assert bounds & kind.keys(), f"{name}.{option} is a number without a bound"


def test_every_stage_is_a_package_so_that_import_contracts_see_it():
    for stage in technique.STAGES:
        assert (ROOT / "slimline" / stage / "__init__.py").is_file(), stage
    bare = {p.parent.name for p in LIBRARY if not (p.parent / "__init__.py").is_file()}
    assert not bare


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_reads_or_writes_a_pickle(path):
    pickles = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert not [where for where in nested_imports(path) if where[0].partition(".")[0] in pickles]
    calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not {"torch.load", "torch.save", "eval", "exec"} & set(calls)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[-2] == "components"], ids=name_of)
def test_a_port_imports_slimline_only_inside_its_body(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in top_level(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not [name for name in names if name.partition(".")[0] == "slimline"]


@pytest.mark.parametrize("folder", ["docker", "infra"])
def test_images_and_manifests_contain_no_python(folder):
    assert not list((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_long_file_says_why(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) > LONG:
        assert any(re.match(r"#.*\blong", line, re.IGNORECASE) for line in lines[:40]), (
            f"{len(lines)} lines: split it, or say why in a comment near the top ('# Long because ...')"
        )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_is_named_for_nothing(path):
    assert path.stem not in {"utils", "util", "helpers", "common", "base", "manager", "misc"}


def test_the_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project.get("version", slimline.__version__) == slimline.__version__
    assert f"## [{slimline.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_locks_have_a_hash_for_everything_and_name_no_index():
    for lock in (ROOT / "requirements").glob("*.txt"):
        text = lock.read_text()
        assert "--index-url" not in text and "--find-links" not in text and "file:" not in text
        pins = re.split(r"\n(?=\S)", re.sub(r"(?m)^#.*\n?", "", text).strip())
        assert lock.stem.endswith("excluded") or all("--hash=sha256:" in pin for pin in pins), lock.name


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {re.split(r"[\s\[<>=!;]", w)[0].lower().replace("-", "_") for w in wanted}
    known_as = {"yaml": "pyyaml", "google": "protobuf", "triton": "torch"}  # torch for CUDA brings triton
    used = {m.partition(".")[0] for path in SOURCES for m, _ in nested_imports(path)}
    foreign = used - set(sys.stdlib_module_names) - {"slimline", "components", "pipelines"}
    assert {known_as.get(name, name) for name in foreign} <= declared
