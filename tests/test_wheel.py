"""The built wheel, in an empty folder, is as good as the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_launch import parameters

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_alone_runs_the_pipeline_in_an_empty_folder(tmp_path):
    source, installed, empty = tmp_path / "source", tmp_path / "installed", tmp_path / "empty"
    kept = ("slimline", "pyproject.toml", "README.md", "LICENSE")
    source.mkdir()
    for name in kept:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(installed), str(source)]
    subprocess.run(pip, check=True, capture_output=True)
    empty.mkdir()
    values = parameters(empty) | {"distill_method": "none", "prune_method": "none", "train_epochs": 1}
    for stage in ("distill_options", "prune_options", "distill_layers", "distill_epochs"):
        values.pop(stage, None)
    (empty / "recipe.yaml").write_text(yaml.safe_dump(values))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "SLIMLINE_"))}
    environment |= {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    code = "import slimline, sys; sys.stderr.write(slimline.__file__ + chr(10)); from slimline.cli import main; main()"
    command = [sys.executable, "-c", code, "run", "optimize", "-f", "recipe.yaml"]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.startswith(str(installed))
    assert "report.html" in done.stdout and (empty / "slimline-store" / "mlflow.db").is_file()
