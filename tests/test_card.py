"""The model card: what the Hub's own reader makes of it, and what MLflow has room for."""

import pytest
import yaml

from slimline import artifact, card, gate, judging, release, store
from slimline.artifact import Stage
from slimline.errors import GateError
from tests.stores import saved
from tests.test_release import LIMITS, candidate, unloaded  # noqa: F401

CHECK = gate.Check(
    name="accuracy", status="PASS", value=-0.01, low=-0.018, high=-0.002, limit=-0.02,
    sentence="-1.0 points against the baseline, at worst -1.8 points (allowed -2.0 points).",
)  # fmt: skip
VERDICT = gate.Verdict(
    status="PASS", sentence="PASS: accuracy -1.0 points; 6.4x as fast.", limits=LIMITS, limits_digest=LIMITS.digest(),
    checks=(CHECK,), examples=2000, flips_lost=60, flips_won=40,
)  # fmt: skip


def evaluated(folder, accuracy: float) -> str:
    """The ref of a quality evaluation with this accuracy."""
    folder.mkdir(parents=True)
    (folder / "predictions.parquet").write_bytes(b"not looked at")
    numbers = {"accuracy": accuracy, "accuracy_low": accuracy - 0.02, "accuracy_high": accuracy + 0.02}
    stage = Stage(
        technique="evaluate.classification", config={"data": "/data/reviews.parquet", "split": "test"},
        metrics=numbers, parent="p", data={"data": "d" * 64},
    )  # fmt: skip
    manifest = artifact.seal(
        folder, format="evaluation", task="text-classification", labels=(), base="", history=(stage,)
    )
    with store.step_run("evaluate.classification", {}, {}) as run_id:
        return store.save(run_id, folder, manifest)


@pytest.fixture
def judged(fresh_store, tmp_path):
    """What a card is written from: the verdict, what was asked, and the manifest of a model with a history."""
    asked = judging.Judging(
        name="reviews", champion=None, limits=LIMITS, quality=evaluated(tmp_path / "q" / "evaluation", 0.844),
        baseline=evaluated(tmp_path / "b" / "evaluation", 0.861), latency="",
    )  # fmt: skip
    return VERDICT, asked, manifest(tmp_path / "model")


def manifest(folder, stages: int = 3, base: str = "hub:sentence-transformers/all-MiniLM-L6-v2@8b3219a9"):
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"x" * 15_000_000)
    options = {"heads": 0.5, "note": "a | b <b>"}
    history = tuple(
        Stage(technique=f"prune.heads{i}", config=options, metrics={}, parent="", seconds=60) for i in range(stages)
    )
    return artifact.seal(
        folder, format="onnx", task="text-classification", labels=("negative", "positive"), base=base, history=history
    )


def test_the_hub_reads_the_card_with_its_results(judged):
    hub = pytest.importorskip("huggingface_hub")
    read = hub.ModelCard(card.whole("reviews", 3, *judged))
    assert read.data.library_name == "onnx" and read.data.pipeline_tag == "text-classification"
    assert read.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    (result,) = read.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 0.844, "test")
    assert result.dataset_name == "reviews.parquet"
    assert read.text.lstrip().startswith("# reviews, version 3\n")


def test_the_card_says_what_it_is_from_what_lost_won_and_how_to_load_it(judged):
    text = card.whole("reviews", 3, *judged)
    for part in (
        "6.4x as fast", "15.0 MB of weights", "negative, positive", judged[2].digest, "prune.heads1",
        "at worst -1.8 points", "| this model | 0.844 | 0.824 to 0.864 |", "| the baseline | 0.861 |",
        "2000 examples of /data/reviews.parquet", "60 answers that were right are wrong now, 40 the other way round",
        "2.0 points of accuracy", 'load_model("models:/reviews/3")',
    ):  # fmt: skip
        assert part in text, part


def test_as_a_description_it_is_markdown_without_a_front_and_fits_into_mlflow(judged):
    text = card.description("reviews", 3, *judged)
    assert text.startswith("# reviews, version 3\n") and len(text) <= store.DESCRIPTION
    block = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block)["pipeline_tag"] == "text-classification"
    assert text.count("```") == 4  # each block of code is closed


@pytest.mark.parametrize("stages", [40, 400])
def test_a_long_history_is_cut_to_what_mlflows_tables_hold(judged, tmp_path, stages):
    verdict, asked, _ = judged
    text = card.description("reviews", 3, verdict, asked, manifest(tmp_path / "long", stages))
    assert 3000 < len(text) <= store.DESCRIPTION and text.count("```") % 2 == 0
    assert stages == 40 or text.endswith("*Cut: the whole card is `slimline card models:/reviews/3`.*\n")


def test_what_comes_from_outside_does_not_become_markdown(judged, tmp_path):
    odd = manifest(tmp_path / "odd", 1, base="./a|b<script>*x*`y`")
    text = card.whole("reviews", 3, judged[0], judged[1], odd)
    assert "\\|b\\<script>\\*x\\*\\`y\\`" in text and "a \\| b \\<b>" in text
    assert "base_model" not in text  # what the Hub does not have it is not told


def test_every_registered_version_has_its_card_and_one_without_a_verdict_has_none(fresh_store, tmp_path):
    version, _ = candidate(tmp_path / "1", b"one")
    assert f"# reviews, version {version}" in store.version_of(f"models:/reviews/{version}").description
    assert release.model_card("models:/reviews/1").startswith("---\nlibrary_name: transformers\n")
    ref = saved(tmp_path / "plain")
    store.register("plain", ref, key="k", version_tags={}, description="")
    with pytest.raises(GateError, match="no verdict, and so no card"):
        release.model_card("models:/plain/1")
