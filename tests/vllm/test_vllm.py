"""vLLM, on a processor, reads what quantize.* writes and answers as it says: make test-vllm, which installs it apart.

Its kernels there take 4-bit weights, int8 with dynamic or static inputs, and fp8 with dynamic ones.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slimline import decoder, step
from tests.decoders import make_decoder, make_documents, seal_decoder

ROOT = Path(__file__).parent.parent.parent
PYTHON = ROOT / "build" / "vllm" / "bin" / "python"
TEXTS = [[0, *np.random.default_rng(i).integers(2, 29, 24 + 9 * i).tolist()] for i in range(3)]


def in_vllm(folder):
    command = [str(PYTHON), str(Path(__file__).parent / "answer.py"), str(folder)]
    done = subprocess.run(command, input=json.dumps(TEXTS), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.concatenate(json.loads(done.stdout.splitlines()[-1]))


def here(model):
    """The same of a model in this process."""
    said = []
    for ids in TEXTS:
        with torch.no_grad():
            scores_TW = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
        said.append(scores_TW[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy())
    return np.concatenate(said)


def in_transformers(folder):
    from transformers import AutoModelForCausalLM

    return here(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def apart(one, other):
    return float(np.abs(one - other).mean())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    shape = {"layers": 2, "width": 256, "heads": 4, "groups": 2, "feed": 512}
    return seal_decoder(make_decoder("llama", tmp_path_factory.mktemp("vllm") / "base", **shape))


@pytest.fixture(scope="module")
def documents(base):
    return make_documents(base.parent / "documents.parquet")


@pytest.fixture(scope="module")
def noise(base):
    """How far bfloat16 alone moves an answer."""
    return apart(in_vllm(base), here(decoder.load(base)))


CALIBRATED = {"windows": 16, "length": 32}
FORMS = {
    "int4": ("rtn", {"bits": 4, "group_size": 64}),
    "int4, a scale an output": ("rtn", {"bits": 4, "group_size": 0}),
    "int4, zero points": ("gptq", {"bits": 4, "group_size": 128, "symmetric": False, **CALIBRATED}),
    "int8, dynamic": ("smoothquant", CALIBRATED),
    "int8, static": ("smoothquant", {"activations": "static", **CALIBRATED}),
    "fp8, dynamic": ("fp8_w8a8", {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_it_answers_as_the_numbers_that_were_written(form, base, documents, noise, tmp_path):
    name, options = FORMS[form]
    data = {"data": str(documents)} if "windows" in options else {}
    out = tmp_path / "out"
    step.run_on_folder(f"quantize.{name}", base, out, options | data, lambda event: None)
    floats, found = here(decoder.load(base)), in_vllm(out)
    if name in ("rtn", "gptq"):  # nothing is rounded but what was written
        written = here(decoder.load(out))
        assert apart(found, written) <= max(2 * noise, apart(written, floats) / 2)
    else:  # inputs are rounded as it runs, and bfloat16 tips some of them: another draw of the same error
        assert apart(found, floats) <= 2 * (noise + apart(in_transformers(out), floats))


def test_keys_and_values_are_scaled_into_fp8s_range(base, documents, noise, tmp_path):
    loud, out = tmp_path / "loud", tmp_path / "out"
    loud.mkdir()
    weights = load_file(base / "model.safetensors")
    for name, weight in weights.items():
        for part, factor in {"k_proj": 2.0**12, "q_proj": 2.0**-12, "v_proj": 2.0**12, "o_proj": 2.0**-12}.items():
            if part in name:
                weight.mul_(factor)
    save_file(weights, loud / "model.safetensors", metadata={"format": "pt"})
    decoder.copy_rest(base, loud)
    seal_decoder(loud)
    step.run_on_folder("quantize.kv_cache", loud, out, {"data": str(documents), **CALIBRATED}, lambda event: None)
    floats = here(decoder.load(base))
    assert apart(in_vllm(out), floats) <= 2 * (noise + apart(in_transformers(out), floats))
