"""The GPU's language-model benchmark, rehearsed on a processor: its arithmetic, its parity and its page."""

import argparse
import json

import pytest
import torch

from benchmarks import gpu_llm, runner
from benchmarks.gpu_llm import Ceilings, Shape, Work, parameters, work
from slimline.errors import ConfigError, ModelError
from slimline.packed import Integers, pack

SMALL = Shape(layers=2, width=8, feed=16, heads=4, groups=2, vocabulary=10)


def test_a_model_counts_its_weights_once():
    # a layer: query and output 8 x 8, key and value 4 x 8, three of 16 x 8; the embedding 10 x 8 is the head
    assert parameters(SMALL) == 2 * (2 * 64 + 2 * 32 + 3 * 128) + 80


def test_one_token_moves_all_weights_and_all_that_came_before():
    asked = work(SMALL, weights=1000, kind="int8", texts=3, tokens=1, places=5)
    maps = 2 * (2 * 64 + 2 * 32 + 3 * 128)
    head, kept, logits = 2 * 80, 2 * 2 * 2 * 2 * 2 * 3 * 5, 2 * 10 * 3
    assert asked.bytes == 1000 + head + kept + logits
    assert asked.operations == {"int8": 2 * maps * 3, "bf16": 2 * 80 * 3 + 4 * 2 * 4 * 2 * 3 * 5}


def test_a_prompt_sees_half_of_its_places_and_bf16_is_summed():
    asked = work(SMALL, weights=0, kind="bf16", texts=1, tokens=4, places=4)
    seen = 1 + 2 + 3 + 4
    maps = 2 * (2 * 64 + 2 * 32 + 3 * 128)
    assert asked.operations == {"bf16": 2 * maps * 4 + 2 * 80 + 4 * 2 * 4 * 2 * seen}


def test_the_floor_is_the_larger_of_moving_and_computing():
    ceilings = Ceilings(100.0, {"bf16": 10.0, "fp8": 20.0})
    assert ceilings.floor_s(Work(300.0, {"bf16": 10.0, "fp8": 20.0})) == (3.0, "bytes")
    assert ceilings.floor_s(Work(100.0, {"bf16": 10.0, "fp8": 20.0})) == (2.0, "operations")


@pytest.mark.parametrize("zeros", [False, True])
def test_four_bits_are_multiplied_as_they_are_stored(zeros):
    draw = torch.Generator().manual_seed(0)
    numbers_OI = torch.randint(-8, 8, (16, 64), dtype=torch.int8, generator=draw)
    scale_OC = torch.rand(16, 2, generator=draw) + 0.5
    zero_OC = torch.randint(-8, 8, (16, 2), dtype=torch.int8, generator=draw) if zeros else None
    matrix = runner.Matrix(numbers_OI, scale_OC, zero_OC, 4)
    whole = Integers(numbers_OI, scale_OC, zero_OC).floats()
    assert torch.equal(matrix.floats(), whole)
    assert gpu_llm.apart(runner.widen(*runner.halves(matrix)), whole) < 0.003
    assert matrix.size == 16 * 64 // 2 + 2 * 16 * 2
    x_MI = torch.randn(3, 64, generator=draw).bfloat16()
    for kernel in runner.KERNELS["int4"]:
        given = kernel.multiply(x_MI, None, *kernel.keep(matrix)).floats()
        assert gpu_llm.apart(given, x_MI.float() @ whole.T) < gpu_llm.PRODUCT_ERROR
    assert ".weight_zero_point" in pack(Integers(numbers_OI, scale_OC, zero_OC), 4) or not zeros


def test_scales_behind_a_product_and_inside_say_the_same():
    draw = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(32, 64, generator=draw)
    scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 448
    matrix = runner.Matrix((weight_OI / scale_O1).to(torch.float8_e4m3fn), scale_O1, None, 8)
    stored, by = runner.low(torch.randn(3, 64, generator=draw), "float")
    wanted = stored.float() * by @ matrix.floats().T
    for kernel in runner.KERNELS["fp8"]:
        given = kernel.multiply(stored, by, *kernel.keep(matrix)).floats()
        assert gpu_llm.apart(given, wanted) < gpu_llm.PRODUCT_ERROR


def test_a_row_too_few_for_a_kernel_is_filled_up_and_left_out_again():
    stored, by = runner.low(torch.ones(2, 16), "int", rows=32)
    assert stored.shape == (32, 16) and not stored[2:].any() and len(by) == 2
    matrix = runner.Matrix(torch.ones(24, 16, dtype=torch.int8), torch.ones(24, 1), None, 8)
    (kernel,) = runner.KERNELS["int8"]
    assert kernel.multiply(stored, by, *kernel.keep(matrix)).floats().shape == (2, 24)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    asked = argparse.Namespace(
        shape="tiny", device="cpu", minutes=5.0, batches="2", prompts="", context=12, scratch=folder, out=folder
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_llm, "QUERIES", 6)
        patch.setattr(gpu_llm, "BLOCKS", 2)
        patch.setattr(gpu_llm.bench, "warm_up", lambda call, queries: call(0))
        return gpu_llm.measure(asked, folder / "models"), folder


@pytest.mark.slow
def test_a_rehearsal_makes_all_forms_and_finds_them_right(rehearsed):
    found, folder = rehearsed
    assert found["skipped"] == {}
    assert list(found["parity"]) == ["bf16", "fp8", "int8", "int4"]
    for form, row in found["parity"].items():
        assert set(row["products"]) == {kernel.name for kernel in runner.KERNELS[form]}
        assert max(row["logits"], row["step"]) < gpu_llm.LOGIT_ERROR
    assert set(found["steps"]["2"]) == set(gpu_llm.TECHNIQUES)
    assert json.loads((folder / "gpu_llm.json").read_text())["steps"]["2"].keys() == found["steps"]["2"].keys()


@pytest.mark.slow
def test_the_page_has_a_roofline_beside_every_row_and_says_what_is_slower(rehearsed):
    found, folder = rehearsed
    told = (folder / "gpu_llm.md").read_text()
    for form, row in found["steps"]["2"].items():
        assert f"| 2 | {form} | {row['kernel']} | {row['p50_ms']:.3f} |" in told
    row = {"ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.6}
    near = {"ratio": 1.1, "ratio_low": 0.9, "ratio_high": 1.2}
    assert list(gpu_llm.slower({"steps": {"8": {"bf16": row, "fp8": row}}, "reads": {"64": {"int4": near}}})) == [
        "- fp8 is slower than bf16 at 8 texts: 0.50x.",
        "- int4 is not proven faster than bf16 at 64 tokens: 1.10x.",
        "",
    ]


@pytest.mark.slow
def test_a_kernel_that_strays_is_left_out_and_a_form_without_one_is_refused(rehearsed, monkeypatch):
    _, folder = rehearsed
    broken = runner.Kernel("broken", "", runner._plain, lambda x, _, weight: runner.Product(2 * x @ weight.T))
    monkeypatch.setitem(runner.KERNELS, "bf16", [broken])
    models, skipped = {"bf16": runner.Model(folder / "models" / "bf16", "cpu")}, {}
    with pytest.raises(ModelError, match="none of its kernels"):
        gpu_llm.check(models, "bf16", folder / "models" / "bf16", skipped)
    assert "off, of 0.01 allowed" in skipped["bf16, broken"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu_it_is_said():
    with pytest.raises(ConfigError, match="no NVIDIA GPU"):
        gpu_llm.main([])
