"""What decides whether a technique says the same on a GPU as on the processor."""

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import gpu_techniques
from benchmarks.gpu_techniques import Case, compared, distance, page, weights_apart
from slimline import technique

SIDE = {"metrics": {"loss": 2.0}, "seconds": 1.0, "peak_bytes": 5, "held_bytes": 0, "device": "cuda"}


def stored(folder, **tensors):
    folder.mkdir(parents=True)
    save_file({name: torch.tensor(values) for name, values in tensors.items()}, folder / "model.safetensors")
    return folder


def test_every_case_names_a_technique_and_options_that_it_has():
    for case in gpu_techniques.CASES:
        module = technique.find(case.name)
        others = {"data": "texts", "teacher": "model", "base": "model"}
        given = {name: value for name, value in others.items() if name in module.Config.model_fields}
        technique.configure(module, given | case.options)


def test_numbers_near_zero_are_not_compared_by_their_own_size():
    assert distance(3.0, 4.0) == 0.25
    assert distance(1e-9, 2e-9) == pytest.approx(1e-7)


def test_the_weight_that_is_furthest_apart_is_named(tmp_path):
    one = stored(tmp_path / "one", a=[3.0, 4.0], b=[0.0, 0.0])
    other = stored(tmp_path / "other", a=[3.0, 4.0], b=[0.0, 5.0])
    assert weights_apart(one, other) == (pytest.approx((25 / 50) ** 0.5), "b")
    assert weights_apart(one, stored(tmp_path / "third", a=[3.0, 4.0])) == (float("inf"), "names")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"peak_bytes": 0}, ["did not use the GPU"]),
        ({"held_bytes": 2 << 20}, ["2.1 MB of the GPU held afterwards"]),
        ({"metrics": {"loss": 3.0}}, ["loss differs by 0.33"]),
        ({"failed": "RuntimeError: no"}, ["gpu: RuntimeError: no"]),
    ],
)
def test_what_is_wrong_is_said(change, said, tmp_path):
    for where in ("cpu", "gpu"):
        stored(tmp_path / where / "quantize.rtn", a=[1.0])
    row = compared(Case("quantize.rtn", {}), SIDE, SIDE | change, tmp_path)
    assert row["wrong"] == said
    told = page({"machine": {"gpu": "NVIDIA H200"}, "cases": {"quantize.rtn": row}, "learning": {}})
    assert f"{0 if said else 1} of 1 agree." in told and ("; ".join(said) or "agrees") in told
