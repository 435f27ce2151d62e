#!/usr/bin/env bash
# Write the locks anew from pyproject.toml and requirements/*.in. Known pins stay unless LOCK_FLAGS="--upgrade".
# torch-cpu.txt is written by hand: its hashes are those that PyTorch's index shows.
set -euo pipefail
cd "$(dirname "$0")/.."
resolve() {
    "${VENV:-.venv}/bin/uv" pip compile -q --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
        --no-annotate --no-header ${LOCK_FLAGS:-} "$@"
}
resolve requirements/installer.in -o requirements/installer.txt
resolve pyproject.toml requirements/needs.in --extra all --excludes requirements/excluded.txt -o requirements/run.txt
resolve requirements/cpu.in --no-deps -o requirements/cpu.txt
resolve requirements/cuda.in -c requirements/run.txt -o requirements/cuda.txt
# What the images hold (docker/Dockerfile): steps, the executor that Kubeflow starts them with, engines, the server.
resolve pyproject.toml requirements/needs.in requirements/step.in --extra train --extra onnx \
    --excludes requirements/step-excluded.txt -c requirements/run.txt -o requirements/step.txt
resolve pyproject.toml requirements/needs.in requirements/step.in --extra train --extra onnx --extra language --extra genai \
    --excludes requirements/language-excluded.txt -c requirements/run.txt -c requirements/step.txt \
    -o requirements/language.txt
resolve requirements/executor.in --no-deps -c requirements/run.txt -o requirements/executor.txt
resolve pyproject.toml requirements/step.in --extra tensorrt --excludes requirements/tensorrt-excluded.txt \
    -c requirements/run.txt -c requirements/cuda.txt -o requirements/tensorrt.txt
resolve pyproject.toml requirements/needs.in requirements/step.in --extra llm \
    --excludes requirements/llm-excluded.txt -o requirements/llm.txt
resolve requirements/mlflow.in -c requirements/run.txt -o requirements/mlflow.txt
resolve requirements/sbom.in -o requirements/sbom.txt
resolve requirements/checkov.in -o requirements/checkov.txt
resolve requirements/vllm.in --excludes requirements/vllm-excluded.txt -o requirements/vllm.txt
resolve --group dev --excludes requirements/dev-excluded.txt -c requirements/run.txt -c requirements/cuda.txt \
    -o requirements/dev.txt
