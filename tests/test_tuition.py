import math

import pytest

from slimline import technique, tuition
from slimline.distill import tokens


def plan(**options):
    return technique.configure(tokens, {"data": "-", "teacher": "-", **options})


def test_the_rate_rises_and_falls_as_asked():
    linear = plan(learning_rate=0.1, warmup=0.2, decay="linear")
    assert [tuition.rate(step, 10, linear) for step in (0, 1, 2, 6, 9)] == pytest.approx(
        [0.1 / 3, 0.2 / 3, 0.1, 0.05, 0.0125]
    )
    cosine = plan(learning_rate=0.1, warmup=0, decay="cosine")
    assert [tuition.rate(step, 4, cosine) for step in range(4)] == pytest.approx(
        [0.1, 0.05 * (1 + math.sqrt(0.5)), 0.05, 0.05 * (1 - math.sqrt(0.5))]
    )
    assert tuition.rate(7, 8, plan(learning_rate=0.1, warmup=0, decay="none")) == 0.1


def test_every_epoch_reads_every_row_once_in_another_order():
    steps = [tuition.rows_of(step, 4, 10, seed=3) for step in range(5)]
    read = [row for rows in steps for row in rows]
    assert sorted(read[:10]) == sorted(read[10:]) == list(range(10))
    assert read[:10] != read[10:]
    assert tuition.rows_of(2, 4, 10, seed=3) == steps[2] != tuition.rows_of(2, 4, 10, seed=4)
