#!/usr/bin/env bash
# Make a virtual environment and install what is locked: every file is checked against its hash (docs/adr/0003-lock.md).
# Usage: requirements/install.sh run|dev|vllm.  Settings: VENV, PYTHON, TORCH (auto, cpu, cuda), TORCH_INDEX.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv} torch=${TORCH:-auto}
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

say() { printf '%s\n' "$*" >&2; }
suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }

find_python() {
    for python in ${PYTHON:-python3.11 python3.12 python3}; do
        if suits "$python"; then
            echo "$python"
            return
        fi
    done
    say "slimline needs Python 3.11 or 3.12; tried: ${PYTHON:-python3.11 python3.12 python3}." \
        "Install one (apt-get install python3.11 python3.11-venv) or name it: make ${1:-run} PYTHON=/path/to/python3.11"
    return 1
}

make_venv() {
    local python
    python=$(find_python "$1")
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        say "$python cannot make a virtual environment: its venv module is a package of its own here." \
            "Run: apt-get install python3-venv"
        return 1
    fi
    say "Making $venv with $("$python" --version)."
    "$python" -m venv "$venv"
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
locked() { pip install -q --no-deps --no-compile --require-hashes "$@"; }

# uv does in 10 s what pip does in 75; but it does not read pip's settings, so where it fails pip has its turn.
fast() {
    UV_SYSTEM_CERTS=1 "$venv/bin/uv" pip install -q --python "$venv/bin/python" --no-deps --require-hashes "$@" ||
        { say "uv could not; pip takes over (about a minute)."; locked "$@"; }
}

torch_cpu() {
    # First pip's own settings (a folder, a company's mirror), then PyTorch's index, unless an index was asked for.
    { [ -z "${TORCH_INDEX:-}" ] && locked --retries 1 -r requirements/torch-cpu.txt 2>/dev/null; } ||
        locked --extra-index-url "$index" -r requirements/torch-cpu.txt
}

install_run() {
    locked -r requirements/installer.txt
    fast -r requirements/run.txt
    if [ "$torch" = auto ]; then
        torch=cpu
        if nvidia-smi -L 2>/dev/null | grep -q GPU; then torch=cuda; fi
    fi
    if [ "$torch" = cpu ] && ! { fast -r requirements/cpu.txt && torch_cpu; }; then
        say "No CPU build of torch within reach: not in pip's settings, not at $index (set TORCH_INDEX)." \
            "Taking the CUDA build from PyPI instead: it works without a GPU too, and is a download of 3 GB."
        pip uninstall -q -y onnxruntime
        torch=cuda
    fi
    if [ "$torch" = cuda ]; then fast -r requirements/cuda.txt; fi
    pip install -q --no-deps --no-build-isolation -e .
}

[ -x "$venv/bin/python" ] || make_venv "$1"
case $1 in
    run) install_run ;;
    dev) fast -r requirements/dev.txt ;;
    vllm)
        locked -r requirements/installer.txt
        fast -r requirements/vllm.txt
        torch_cpu
        ;;
    *) say "usage: requirements/install.sh run|dev|vllm"; exit 2 ;;
esac
