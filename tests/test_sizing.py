"""The sizing page is computed from what was measured, and from nothing else."""

from benchmarks import sizing

KNOWN = {
    "machine": {"cores": 2, "cpu": "a processor"},
    "runs": {
        "runs": 100, "processor_s": {"tracking": 8.64, "database": 0.864, "bucket": 0.0864}, "database_bytes": 10**7,
    },
    "growth": [
        {"runs": 0, "actions": {"a step with its model": {"seconds": 0.2, "pages": 1}}},
        {"runs": 10_000, "actions": {"a step with its model": {"seconds": 0.21, "pages": 1}}},
    ],
    "transfer": {"slimline up": {"mb_per_s": 1000.0}},
}  # fmt: skip


def test_cores_grow_with_optimizations_and_are_half_busy():
    few, many = sizing.needs(KNOWN, 1_000), sizing.needs(KNOWN, 100_000)
    assert few["tracking_cores"] == 1_000 * 8.64 / 86_400 / 0.5 == 0.2
    assert many["tracking_cores"] == 100 * few["tracking_cores"]
    assert few["database_gb_a_year"] == 365 * 1_000 * 10**5 / 1e9


def test_the_part_that_is_full_first_is_the_one_that_works_most_for_each():
    assert sizing.first(KNOWN) == ("tracking", 2 * 0.5 * 86_400 / 8.64)


def test_the_page_names_it_with_its_number():
    page = sizing.page(KNOWN)
    assert "is the tracking server: with two cores it is half busy at 10,000 optimizations a day" in page
    assert "| tracking server, cores | 0.00 | 0.20 | 20.00 |" in page
