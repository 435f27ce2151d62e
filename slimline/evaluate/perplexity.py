"""How well a language model foresees text: perplexity, and bits per byte, which other tokenizers can be held against.

Texts are cut into windows in which each token is scored once (see scoring.py). They are scored apart, each from its own
beginning: what a text costs then depends on that text alone, so that texts are independent and both the intervals here
and the gate's paired test, a bootstrap over texts, are sound. `joined` scores them as one stream instead, as the papers
of quantization do with WikiText; most tokens then have a whole window before them, so numbers are lower, compare with
published ones, and have intervals that trust neighbours a little too much. Either way two models compare only in
the same windows.

Writes documents.parquet, a row for every text in the data's order:

    id       of the text
    tokens   scored in it; 0 where a model has no token to begin a text with and the text is one token
    bytes    of UTF-8 that these tokens are
    nll      sum of the tokens' negative log likelihoods, in nats, float64
    digest   of the tokens and windows: where two models' digests are equal, their nll may be compared token by token

and length, stride and joined as JSON under the key "windows" of its schema's metadata. Perplexity is
exp(sum of nll / sum of tokens), bits per byte sum of nll / ln 2 / sum of bytes.

With `baseline`, log_perplexity_ratio is the change of the first's logarithm (0.01 is 1 % more perplexity) and
bits_per_byte_change that of the second, both paired by text; the ratio is left out if the tokens are others.

Cost: one pass of the model over the text, or up to length / stride where texts are longer than a window.

Shapes: D = documents.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from pydantic import Field

from slimline import language, scoring
from slimline.errors import DataError
from slimline.scoring import Floats, ScoringConfig, Text
from slimline.technique import Metrics, Stored, track

NEEDS = "any"
GIVES = "evaluation"

DOCUMENTS = "documents.parquet"


class Config(ScoringConfig):
    """The windows, and what the model is compared with."""

    baseline: Stored = Field("", description="evaluation of another model on the same texts, to compare with")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Score every text of the split, write the sums down, and return the numbers."""
    model = language.load(source, config.threads or None)
    scoring.check(model, source, config)
    text = scoring.read(model.tokenizer, config)
    nll_D = np.zeros(len(text.ids))
    for window in track(text.windows, "scoring text"):
        nll_S = scoring.surprise(scoring.logits(model, window), window.target_S)
        np.add.at(nll_D, window.owner_S, scoring.finite(nll_S, source))
    metrics = {
        "documents": float(len(text.ids)),
        "tokens": float(text.token_count_D.sum()),
        "bytes": float(text.byte_count_D.sum()),
        **scoring.ratio("perplexity", nll_D, text.token_count_D, math.exp),
        **scoring.ratio("bits_per_byte", nll_D / math.log(2), text.byte_count_D),
    }
    if config.baseline:
        metrics |= compare(Path(config.baseline), text, nll_D, _windows(config))
    _write(out / DOCUMENTS, text, nll_D, _windows(config))
    return metrics


def compare(folder: Path, text: Text, nll_D: Floats, windows: str) -> Metrics:
    """The change against a baseline, text by text. Raises DataError if it scored other texts or in other windows."""
    import pyarrow.parquet as pq

    file = folder / DOCUMENTS
    if not file.is_file():
        raise DataError(f"{folder} has no {DOCUMENTS}. Name an evaluation made by evaluate.perplexity.")
    table = pq.read_table(file)
    there = (table.schema.metadata or {}).get(b"windows", b"{}").decode()
    if json.loads(there) != json.loads(windows):
        raise DataError(f"the baseline {folder} was scored in windows of {there}, not {windows}. Use one for both.")
    if table["id"].to_pylist() != text.ids or table["bytes"].to_pylist() != text.byte_count_D.tolist():
        raise DataError(
            f"the baseline {folder} scored {len(table)} texts which are not the {len(text.ids)} scored here. "
            "Evaluate both on the same data and split."
        )
    change_D = nll_D - table["nll"].to_numpy()
    metrics = scoring.ratio("bits_per_byte_change", change_D / math.log(2), text.byte_count_D)
    if table["digest"].to_pylist() == text.digests:
        metrics |= scoring.ratio("log_perplexity_ratio", change_D, text.token_count_D)
    return metrics


def _windows(config: ScoringConfig) -> str:
    return json.dumps({"length": config.length, "stride": config.stride, "joined": config.joined})


def _write(file: Path, text: Text, nll_D: Floats, windows: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "id": pa.array(text.ids, pa.string()),
        "tokens": pa.array(text.token_count_D.astype(np.int64)),
        "bytes": pa.array(text.byte_count_D.astype(np.int64)),
        "nll": pa.array(nll_D, pa.float64()),
        "digest": pa.array(text.digests, pa.string()),
    }
    pq.write_table(pa.table(columns).replace_schema_metadata({"windows": windows}), file)
