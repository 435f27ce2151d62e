"""What a processor is and can do, from what its kernel says."""

from slimline import processor

CPUINFO = """processor\t: 0
model name\t: AMD EPYC
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni

processor\t: 1
model name\t: another
flags\t\t: fpu
"""


def test_the_first_processor_speaks_for_all():
    found = processor.read(CPUINFO)
    assert found == ("AMD EPYC", {"fpu", "sse2", "avx2", "avx512f", "avx512_vnni"})
    assert found.has("avx_vnni", "avx512_vnni") and not found.has("amx_bf16")


def test_an_arm_processor_calls_its_flags_features():
    assert processor.read("Features\t: fp asimd i8mm bf16\n") == ("", {"fp", "asimd", "i8mm", "bf16"})


def test_what_is_not_said_is_not_there():
    assert processor.read("") == ("", frozenset())
