"""One loader and one answer for every format, so that a consumer never cares which variant won.

    load("folder").predict(["a fine film"])  ->  [{"label": "positive", "score": 0.98}]

A language model writes on: text in, text out (see language.py; MLflow's inference parameters are those of sampling.py).
A folder of format hf runs in PyTorch, one of format onnx in ONNX Runtime, each on the best device there is, and one
of format tensorrt on the GPU it was built for, or not at all (see engine.py); `runtime` says which it was. Neither
of the latter two imports torch or transformers. MLflow finds `_load_pyfunc` here. `python -m
slimline.serve FOLDER` gives the mechanical blessing (see probe.py): one line of JSON, and exit code 0, or 3
with the problem.

Shapes: B = texts, L = labels.
"""

# Long because every runtime has to be asked in its own way, for one and the same answer.
from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline import artifact, decoder, engine, hf, language
from slimline.artifact import Manifest
from slimline.errors import DataError, ModelError
from slimline.sampling import Sampling

if TYPE_CHECKING:
    import pandas as pd

Floats = np.ndarray[Any, np.dtype[Any]]

BATCH = 32
"""Texts that are answered together at most."""


MULTIPLE = 8
"""Lengths that an engine is asked for are multiples of this: each other shape costs a CUDA graph of its own."""


class Predictor(ABC):
    """A loaded model: texts in, labels and scores out, whatever runs inside."""

    runtime = ""
    """What answers, such as 'ONNX Runtime 1.32.0 (CPUExecutionProvider)'."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.labels = manifest.labels
        self.batch = batch_size(manifest)
        self.tokenizer = hf.tokenizer(path, hf.max_length(path))

    @abstractmethod
    def _answer(self, texts: list[str]) -> Floats:
        """[B, L] for one batch, in order."""

    def logits(self, texts: Sequence[str]) -> Floats:
        """float32 [B, L], in the order of the texts.

        Raises DataError for what is not text, ModelError for answers of the wrong shape or not finite.
        """
        clean = _clean(texts)
        order = list(range(len(clean)))
        if len(clean) > self.batch > 1:  # texts of like length go together, so that little is padded
            order.sort(key=lambda i: len(clean[i]))
        logits_BL = np.zeros((len(clean), len(self.labels)), dtype=np.float32)
        for start in range(0, len(clean), self.batch):
            rows = order[start : start + self.batch]
            answer = self._answer([clean[i] for i in rows])
            if answer.shape != (len(rows), len(self.labels)):
                raise ModelError(
                    f"the model gives {answer.shape} numbers for {len(rows)} texts and "
                    f"{len(self.labels)} labels. Fine-tune or export it again."
                )
            logits_BL[rows] = answer
        if not np.isfinite(logits_BL).all():
            raise ModelError("the model answers with NaN or infinity. Repeat the step that made it.")
        return logits_BL

    def predict(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """The likeliest label of each text and its probability. Raises DataError for what is not text."""
        probability_BL = softmax(self.logits(texts))
        best_B = probability_BL.argmax(axis=1)
        return [{"label": self.labels[j], "score": float(row[j])} for row, j in zip(probability_BL, best_B)]


class TorchPredictor(Predictor):
    """A model of format hf. `threads` holds for the whole process, as PyTorch has one pool."""

    def __init__(self, path: Path, manifest: Manifest, threads: int | None) -> None:
        super().__init__(path, manifest)
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.model = hf.load(path, manifest.labels)
        device = next(self.model.parameters()).device.type
        self.runtime = f"PyTorch {torch.__version__.partition('+')[0]} ({device})"

    def _answer(self, texts: list[str]) -> Floats:
        return np.asarray(hf.logits(self.model, self.tokenizer, texts), dtype=np.float32)


PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
"""Where ONNX Runtime looks for a device, best first.

Not among them: its TensorRT provider, which would build engines anew in every process that serves, while requests wait
for them. Who wants TensorRT builds once, with export.tensorrt.
"""


class OnnxPredictor(Predictor):
    """A model of format onnx, on the best provider that this machine and this build of ONNX Runtime have."""

    def __init__(self, path: Path, manifest: Manifest, threads: int | None) -> None:
        super().__init__(path, manifest)
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # it plans for each shape it meets, and every batch has another
        options.log_severity_level = 3
        if rounds_activations(manifest):
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        providers = [name for name in PROVIDERS if name in ort.get_available_providers()]
        if "CUDAExecutionProvider" in providers:
            ort.preload_dlls()
        try:
            self.session = ort.InferenceSession(str(path / "model.onnx"), options, providers=providers)
        except Exception as error:  # ONNX Runtime has a dozen unrelated classes for this
            reason = str(error).split("\n")[0]
            hint = "Export it again"
            if "Could not find an implementation" in reason:  # as of bfloat16, on a processor
                hint = "ONNX Runtime has no such arithmetic here: serve an engine built of it, or quantize.fp16 instead"
            raise ModelError(f"{path / 'model.onnx'} does not load: {reason}. {hint}.") from None
        self.inputs = [node.name for node in self.session.get_inputs()]
        if unknown := sorted(set(self.inputs) - set(hf.INPUTS)):
            raise ModelError(f"{path} asks for the input {unknown[0]!r}, which no text has. Export it again.")
        outputs = [node.name for node in self.session.get_outputs()]
        self.output = "logits" if "logits" in outputs else outputs[0]
        self.runtime = f"ONNX Runtime {ort.__version__} ({self.session.get_providers()[0]})"

    def _answer(self, texts: list[str]) -> Floats:
        tokens = self.tokenizer.encode(texts)
        answer = self.session.run([self.output], {name: tokens[name] for name in self.inputs})[0]
        return np.asarray(answer, dtype=np.float32)


class TensorRTPredictor(Predictor):
    """A model of format tensorrt, on the GPU. Raises ModelError naming both if the engine and this machine differ."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.session = engine.Session(path)
        super().__init__(path, manifest)
        self.batch = min(self.batch, max(p["input_ids"].max[0] for p in self.session.record.profiles))
        self.runtime = f"{self.session.record.built_by} ({self.session.gpu.name})"

    def _answer(self, texts: list[str]) -> Floats:
        tokens = self.tokenizer.encode(texts, MULTIPLE)
        return np.asarray(self.session.run(tokens)["logits"], dtype=np.float32)


def load(path: Path, threads: int | None = None) -> Predictor:
    """The model of a sealed directory, ready to answer. Raises ModelError if it is none that can answer."""
    path = Path(path)
    manifest = artifact.read(path)
    if manifest.format == "evaluation":
        raise ModelError(f"{path} is an evaluation, which gives no answers. Name an hf, onnx or tensorrt model.")
    if manifest.task == decoder.TASK:
        raise ModelError(f"{path} is a language model, which has no labels to give. Ask it for text.")
    if not manifest.labels:
        raise ModelError(f"{path} has no labels, so no head for a task. Fit it with train.finetune first.")
    if manifest.format == "tensorrt":
        return TensorRTPredictor(path, manifest)
    kind = OnnxPredictor if manifest.format == "onnx" else TorchPredictor
    return kind(path, manifest, threads)


def batch_size(manifest: Manifest) -> int:
    """How many texts a model may answer together: BATCH, or one if its activations are quantized dynamically.

    Those share one scale in a batch, so that an answer would depend on its neighbours.
    """
    return 1 if any(stage.technique == "quantize.int8_dynamic" for stage in manifest.history) else BATCH


def rounds_activations(manifest: Manifest) -> bool:
    """Whether Q/DQ stands around a model's activations, so that it is to be taken at its word.

    ONNX Runtime would fuse it into integer kernels that cut off large sums on processors without VNNI, and that are
    slower where there are any: MiniLM-L6 in static int8 answers a text in 6 ms instead of 35 (one thread).
    """
    return any(stage.technique in ("quantize.int8_static", "quantize.fp8") for stage in manifest.history)


def softmax(logits_BL: Floats) -> Floats:
    """Probabilities, in float64 so that rows sum to one."""
    grown_BL = np.exp(logits_BL.astype(np.float64) - logits_BL.max(axis=1, keepdims=True))
    probability_BL: Floats = grown_BL / grown_BL.sum(axis=1, keepdims=True)
    return probability_BL


def _clean(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
        raise DataError(f"a list of texts is needed, not one {type(texts).__name__}. Put it in a list.")
    for at, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"item {at} is {text!r} ({type(text).__name__}), not text. Send strings only.")
    return [language.whole(text) for text in texts]


class _Served:
    """What MLflow calls: rows of text in, a table of label and score out."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        import pandas as pd

        answers = self.predictor.predict(_rows(model_input))
        return pd.DataFrame(answers, columns=["label", "score"]).astype({"score": "float64"})


class _Writing:
    """What MLflow calls for a language model: rows of text in, a table of what follows out."""

    def __init__(self, model: language.LanguageModel) -> None:
        self.model = model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        import pandas as pd

        chat, sampling = _asked(params)
        prompts = [prompt_of(text, chat) for text in _rows(model_input)]
        return pd.DataFrame({"generated": self.model.generate(prompts, sampling)}, dtype="object")

    def predict_stream(self, model_input: Any, params: dict[str, Any] | None = None) -> Iterator[str]:
        chat, sampling = _asked(params)
        texts = _rows(model_input)
        if len(texts) != 1:
            raise DataError(f"{len(texts)} texts were sent, but a stream answers one. Send them one by one.")
        return self.model.stream(prompt_of(texts[0], chat), sampling)


def prompt_of(text: Any, chat: bool) -> language.Prompt:
    """A row as a prompt: the text itself, or for a chat what the user says, or the messages so far as JSON."""
    if not isinstance(text, str):
        raise DataError(f"{text!r} ({type(text).__name__}) was sent, not text. Send strings only.")
    if not chat:
        return text
    if text.lstrip().startswith("[{"):
        try:
            messages: list[dict[str, Any]] = json.loads(text)
        except ValueError:
            return [{"role": "user", "content": text}]
        return messages
    return [{"role": "user", "content": text}]


def _asked(params: dict[str, Any] | None) -> tuple[bool, Sampling]:
    """Whether to chat, and how to answer, from MLflow's inference parameters."""
    given = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in (params or {}).items()}
    return bool(given.pop("chat", False)), Sampling.of(given)


def _load_pyfunc(data_path: str) -> _Served | _Writing:
    path = Path(data_path)
    if artifact.read(path).task == decoder.TASK:
        return _Writing(language.load(path))
    return _Served(load(path))


def schema() -> dict[str, dict[str, str]]:
    """The one signature of every model: columns in, columns out, with MLflow's names of their types."""
    return {"inputs": {"text": "string"}, "outputs": {"label": "string", "score": "double"}}


PARAMETERS: dict[str, tuple[str, Any]] = {
    "max_tokens": ("long", 0),
    "temperature": ("double", 0.0),
    "top_p": ("double", 1.0),
    "seed": ("long", 0),
    "stop": ("string", []),
    "chat": ("boolean", False),
}
"""Inference parameters of a language model, with MLflow's names of their types and what they are if nothing is said."""


def _rows(given: Any) -> list[Any]:
    """The texts in a list, a Series, an array, or a table of one column or with one named text."""
    if isinstance(given, str):
        return [given]
    if hasattr(given, "columns") or isinstance(given, dict):
        columns = list(given.columns if hasattr(given, "columns") else given)
        if "text" not in columns and len(columns) != 1:
            raise DataError(f"columns {columns} were sent, but one named 'text' is needed. Rename one.")
        return _rows(given["text" if "text" in columns else columns[0]])
    if isinstance(given, np.ndarray):
        given = given.reshape(-1)
    return list(given.tolist() if hasattr(given, "tolist") else given)


def main(arguments: Sequence[str]) -> int:
    """Print the mechanical blessing of a folder as one line of JSON. Returns the exit code."""
    from slimline import probe

    if len(arguments) != 1:
        sys.stderr.write("usage: python -m slimline.serve FOLDER\n")
        return 2
    found = probe.probe(Path(arguments[0]))
    sys.stdout.write(json.dumps(found) + "\n")
    return 0 if found["ok"] else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
