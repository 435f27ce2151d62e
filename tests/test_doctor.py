import json
import subprocess
import sys

import pytest

from slimline import doctor, processor
from slimline.doctor import GIB, Findings, consequences
from slimline.errors import StoreError

ROOM = {"memory_bytes": 16 * GIB, "disk_free_bytes": 100 * GIB, "cores": 2, "machine": "x86_64"}


def said(**found):
    return "\n".join(consequences(Findings(**{**ROOM, **found})))


def test_a_machine_without_proc_is_no_error(monkeypatch):
    monkeypatch.setattr(doctor, "_text", lambda path: "")
    monkeypatch.setattr(processor, "this", lambda: processor.read(""))
    found = doctor.examine()
    assert found.isa == () and found.cores >= 1 and found.memory_bytes > 0


def test_without_vnni_int8_is_said_to_have_seven_bits():
    assert "7 bits" in said(isa=("avx2",))
    assert "7 bits" not in said(isa=("avx2", "vnni"))


def test_bf16_is_said_to_be_used_only_where_the_processor_has_it():
    assert "training uses it" in said(isa=("avx2", "bf16"))
    assert "Training runs in fp32" in said(isa=("avx2",))


def test_a_gpu_that_torch_cannot_use_is_said_with_what_to_do():
    gpu = {"gpus": ("NVIDIA H100, 81559 MiB, 580.1",), "versions": {"torch": "2.13.0+cpu"}}
    assert "cannot use it: make clean run TORCH=cuda" in said(**gpu)
    assert "trains on the GPU" in said(**gpu, gpu_in_torch=True)
    assert "the extra gpu" in said(**gpu, providers=("CPUExecutionProvider",))
    assert "the extra gpu" not in said(**gpu, providers=("CUDAExecutionProvider", "CPUExecutionProvider"))


def test_a_missing_extra_says_what_cannot_be_done_and_how_to_get_it(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda module: module != "kfp")
    found = doctor.examine()
    assert list(found.missing) == ["launch"]
    assert "`slimline run`" in found.consequences[0] and "pip install 'slimline[launch]'" in found.consequences[0]


@pytest.mark.parametrize(
    ("room", "sentence"),
    [
        ({"memory_bytes": 3 * GIB}, "Less than 4 GiB"),
        ({"disk_free_bytes": GIB}, "Less than 2 GiB of disk"),
        ({"cores": 1}, "One core"),
    ],
)
def test_too_little_room_is_said(room, sentence):
    assert sentence in said(**room)
    assert sentence not in said()


def test_a_store_that_answers_is_named():
    assert doctor.examine(store=lambda: "sqlite:///here.db").store == "sqlite:///here.db"


def test_a_store_that_is_away_is_a_finding_and_not_a_failure():
    def away() -> str:
        raise StoreError("http://nowhere does not answer. Check MLFLOW_TRACKING_URI.")

    found = doctor.examine(store=away)
    assert found.store == "" and "Check MLFLOW_TRACKING_URI" in found.store_problem
    assert any("until the store answers" in sentence for sentence in found.consequences)


def test_a_fault_of_our_own_is_not_hidden_as_a_finding():
    def broken() -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        doctor.examine(store=broken)


def test_the_findings_survive_json_and_the_page_ends_with_what_follows():
    found = doctor.examine()
    assert Findings.model_validate(json.loads(found.model_dump_json())) == found
    assert found.lines()[-1] == f"- {found.consequences[-1]}"


@pytest.mark.skipif(bool(doctor._gpus()), reason="asks torch about the GPU that is here")
def test_examining_a_machine_without_a_gpu_imports_no_torch():
    code = "import sys; from slimline import doctor; doctor.examine(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_a_container_engine_or_tensorrt_it_is_said_what_cannot_be_done():
    assert "needs Docker, or podman" in said() and "pip install 'slimline[tensorrt]'" in said()
    there = said(containers="podman 4.3.1", tensorrt=("tensorrt-rtx-cu12 1.7.1",))
    assert "podman" not in there and "engine" not in there


def test_the_engine_that_answers_is_found_and_one_that_does_not_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.examine().containers == ""
    for name, script in (("docker", "exit 1"), ("podman", "echo 4.3.1")):  # the first has a client, and no engine
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    assert doctor.examine().containers == "podman 4.3.1"
