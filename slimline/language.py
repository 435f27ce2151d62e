"""Language models ready to answer, whatever runs inside: the logits of every position, and text.

    model = load(folder)
    model.logits([[1, 2, 3]])              # float32 [B, T, V]: what may follow each token
    model.generate(["The capital of"])     # the likeliest text that follows; Sampling has other ways
    model.chat([{"role": "user", "content": "Hello"}])
    state = model.prefill([[1, 2, 3]])     # and token by token, to be timed:
    state = model.step(state)              # state.logits_BV says what may follow

A folder of format hf runs in PyTorch, packed weights as floats; one of format genai in ONNX Runtime GenAI.

Shapes: B = texts, T = tokens of each, V = vocabulary.
"""

# Long because every runtime reads, goes on and says its logits in its own way, for one and the same answer.
from __future__ import annotations

import json
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slimline import artifact, chat, decoder, hf, processor, window
from slimline.artifact import Manifest
from slimline.errors import DataError, ModelError
from slimline.processor import Processor
from slimline.sampling import DEFAULT_TOKENS, GREEDY, Floats, Sampling, pick, pieces, until

Tokens = np.ndarray[Any, np.dtype[np.int64]]
Prompt = str | Sequence[chat.Message]

GENAI = "genai_config.json"


class Tokenizer:
    """Text to token ids and back, by the tokenizers library alone; nothing is cut or padded."""

    def __init__(self, folder: Path) -> None:
        self.fast = hf.Tokenizer(folder, 1 << 30).fast
        self.fast.no_truncation()
        values = hf.read_config(folder)
        self.bos, self.eos = (_first(values.get(key)) for key in ("bos_token_id", "eos_token_id"))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts around a text, such as a token that begins it."""
        ids: list[int] = self.fast.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special ones left out."""
        text: str = self.fast.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def size(self) -> int:
        """Token ids that have a text: all are below this."""
        return int(self.fast.get_vocab_size(with_added_tokens=True))


def _first(value: Any) -> int | None:
    if isinstance(value, list):
        return int(value[0]) if value else None
    return None if value is None else int(value)


class LanguageModel(ABC):
    """A loaded language model. A prompt is a text, or the messages of a chat."""

    runtime = ""
    """What answers, such as 'PyTorch 2.13.0 (cpu)'."""

    def __init__(self, path: Path, manifest: Manifest | None) -> None:
        values = hf.read_config(path)
        self.folder = path
        self.tokenizer = Tokenizer(path)
        self.context = decoder.context(values)
        """Tokens that it can hold, prompt and answer together."""
        self.vocabulary = int(values["vocab_size"])
        self.ends = ends(path)
        """Token ids that end an answer."""

    @abstractmethod
    def logits(self, ids_BT: Any) -> Floats:
        """float32 [B, T, V] for texts of one length: position t says what may follow token t."""

    def prefill(self, ids_BT: Any, room: int = DEFAULT_TOKENS) -> State:
        """Read texts of one length, with room for so many tokens to follow. Raises DataError if that is too much."""
        ids_BT = np.asarray(ids_BT, dtype=np.int64)
        length = ids_BT.shape[1]
        if length + room > self.context:
            raise DataError(
                f"the prompt is {length} tokens, and {room} more are asked for, but the model holds {self.context} "
                "together. Shorten the prompt, or ask for fewer tokens."
            )
        logits_BV, cache = self._begin(ids_BT, length + room)
        return State(logits_BV, length, length + room, cache)

    def step(self, state: State, token: int | None = None) -> State:
        """Read one more token a text: the likeliest, or the given one if it is one text. The old state is used up."""
        if state.length >= state.limit:
            raise DataError(f"there was room for {state.limit} tokens, and they are read. Prefill with more room.")
        if token is not None and len(state.logits_BV) != 1:
            raise DataError(f"one token was given for {len(state.logits_BV)} texts. Give none, or read one text.")
        logits_BV = self._go_on(state, token)
        return State(logits_BV, state.length + 1, state.limit, state.cache)

    @abstractmethod
    def _begin(self, ids_BT: Tokens, limit: int) -> tuple[Floats, Any]:
        """Logits [B, V] behind the last token, and a cache that holds `limit` tokens."""

    @abstractmethod
    def _go_on(self, state: State, token: int | None) -> Floats:
        """Logits [B, V] behind one more token, which the cache now holds."""

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt. An empty one becomes the token that begins a text."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(whole(prompt))
        else:
            ids = self.tokenizer.encode(whole(chat.render(self.folder, prompt)), special=False)
        first = self.tokenizer.bos if self.tokenizer.bos is not None else self.tokenizer.eos
        if not ids and first is None:
            raise DataError("the prompt is empty, and the model has no token to begin with. Send a text.")
        return ids or [int(first or 0)]

    def continuation(self, ids: Sequence[int], sampling: Sampling = GREEDY) -> Iterator[int]:
        """The tokens that follow, up to an end token or as many as were asked for."""
        left = self.context - len(ids)
        most = sampling.max_tokens or max(1, min(DEFAULT_TOKENS, left))
        draw = sampling.draw()
        state = self.prefill([ids], most)
        for made in range(most):
            token = pick(state.logits_BV[0], sampling, draw)
            if token in self.ends:
                return
            yield token
            if made + 1 < most:
                state = self.step(state, token)

    def stream(self, prompt: Prompt, sampling: Sampling = GREEDY) -> Iterator[str]:
        """The answer in pieces of whole characters, as they are made; joined they are what `generate` gives."""
        ids = self.encode(prompt)
        return until(sampling.stop, pieces(self.continuation(ids, sampling), ids, self.tokenizer))

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = GREEDY) -> list[str]:
        """What follows each prompt. One after the other, so that no answer depends on its company."""
        return ["".join(self.stream(prompt, sampling)) for prompt in prompts]

    def chat(self, messages: Sequence[chat.Message], sampling: Sampling = GREEDY) -> str:
        """The next message. Raises ModelError for a model without a chat template."""
        chat.check(messages)
        return self.generate([messages], sampling)[0]


@dataclass
class State:
    """Texts of one length under way: what a model has read of them, and what it says may follow."""

    logits_BV: Floats
    length: int
    """Tokens read so far, of each text."""
    limit: int
    """Tokens that there is room for."""
    cache: Any


class TorchLanguageModel(LanguageModel):
    """A model of format hf, on the best device. `threads` holds for the whole process."""

    def __init__(self, path: Path, manifest: Manifest | None, threads: int | None) -> None:
        super().__init__(path, manifest)
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.model = decoder.load(path)
        self.runtime = f"PyTorch {torch.__version__.partition('+')[0]} ({hf.config_device(self.model).type})"

    def logits(self, ids_BT: Any) -> Floats:
        return self._run(ids_BT, use_cache=False)[0]

    def _begin(self, ids_BT: Tokens, limit: int) -> tuple[Floats, Any]:
        cache = window.cache(self.model)
        logits_BTV, cache = self._run(ids_BT, use_cache=True, logits_to_keep=1, past_key_values=cache)
        return logits_BTV[:, -1], cache

    def _go_on(self, state: State, token: int | None) -> Floats:
        next_B = state.logits_BV.argmax(axis=1) if token is None else [token]
        ids_BT = np.asarray(next_B, dtype=np.int64).reshape(-1, 1)
        logits_BTV, state.cache = self._run(ids_BT, use_cache=True, past_key_values=state.cache)
        return logits_BTV[:, -1]

    def _run(self, ids_BT: Any, **settings: Any) -> tuple[Floats, Any]:
        import torch

        with torch.inference_mode():
            ids = torch.as_tensor(np.asarray(ids_BT), device=hf.config_device(self.model))
            answer = self.model(input_ids=ids, **settings)
            logits_BTV: Floats = answer.logits.float().cpu().numpy()
        return logits_BTV, answer.past_key_values


def device(package: Path) -> str:
    """What a package of format genai is for: cpu or cuda."""
    inside = json.loads((package / GENAI).read_text(encoding="utf-8"))["model"]["decoder"]["session_options"]
    return "cuda" if any("cuda" in provider for provider in inside.get("provider_options", [])) else "cpu"


CUDA = "CUDAExecutionProvider"


def providers(package: Path) -> list[str]:
    """What ONNX Runtime runs a package's graph on here: the processor where there is no GPU that it is for."""
    import onnxruntime

    wanted = [CUDA] if device(package) == "cuda" else []
    return [name for name in (*wanted, "CPUExecutionProvider") if name in onnxruntime.get_available_providers()]


KEPT = "logits_to_keep"
"""The input of a package's graph, int64 [1], that says behind how many of the last tokens logits are asked for: 0 for
all; without it, 1 (as in transformers)."""
CACHED = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
"""What keys and values are kept as, by what ONNX Runtime calls it."""


CHUNK = 256
"""Tokens of a prompt that a processor reads at once. Its attention computes what earlier tokens would hear of later
ones, too, and leaves that out of the sums: in chunks there is less of it. ONNX Runtime GenAI 0.18 reads several texts
whole only.
"""


def exact_products(machine: str, known: Processor) -> dict[str, str]:
    """ONNX Runtime's session entries for a processor.

    On x86 without VNNI its quickest product of int8 with int8 overflows; the entry takes the next quickest, which on
    other processors would take twice as long for nothing.
    """
    safe = machine not in ("x86_64", "AMD64") or known.has("avx512_vnni", "avx_vnni")
    return {} if safe else {"session.x64quantprecision": "1"}


def _entries() -> dict[str, str]:
    return exact_products(platform.machine(), processor.this())


class Graph:
    """The graph of a package of format genai in plain ONNX Runtime, which gives the logits of all positions."""

    def __init__(self, package: Path, threads: int | None = None, name: str = "model.onnx") -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 4
        options.enable_mem_pattern = False  # it plans for one length, and every text has another
        for key, value in _entries().items():
            options.add_session_config_entry(key, value)
        values = json.loads((package / GENAI).read_text(encoding="utf-8"))
        self.head_width = int(values["model"]["decoder"]["head_size"])
        try:
            self.session = onnxruntime.InferenceSession(str(package / name), options, providers=providers(package))
        except Exception as error:  # ONNX Runtime has a dozen unrelated classes for this
            raise ModelError(f"{package} does not load: {_line(error)}. Export it again.") from None
        self.overridable = {node.name for node in self.session.get_overridable_initializers()}

    def logits(self, ids_BT: Any, past: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """float32 [B, T, V] behind each token, and keys and values of all tokens so far, to go on with."""
        ids_BT = np.asarray(ids_BT, dtype=np.int64)
        before = next(iter(past.values())).shape[2] if past else 0
        whole = before + ids_BT.shape[1]
        given: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": np.ones((len(ids_BT), whole), dtype=np.int64)}
        given["position_ids"] = np.broadcast_to(np.arange(before, whole), ids_BT.shape).copy()
        for node in self.session.get_inputs():
            if node.name not in given:
                kind = CACHED[node.type]
                none = np.zeros((len(ids_BT), node.shape[1], 0, self.head_width), dtype=kind)
                given[node.name] = past[node.name] if past else none
        names = [node.name for node in self.session.get_outputs()]
        kept = {KEPT: np.array([0])} if KEPT in self.overridable else {}
        inputs = {node.name: given[node.name] for node in self.session.get_inputs()} | kept
        try:
            found = dict(zip(names, self.session.run(names, inputs)))
        except Exception as error:
            raise ModelError(f"the package cannot read {ids_BT.shape[1]} tokens: {_line(error)}.") from None
        logits_BTV = np.asarray(found.pop("logits"), dtype=np.float32)
        return logits_BTV, {name.replace("present", "past_key_values"): value for name, value in found.items()}


class GenaiLanguageModel(LanguageModel):
    """A model of format genai: ONNX Runtime GenAI goes on with texts, ONNX Runtime gives the logits of all positions.

    Either opens the graph when it is first asked. Imports neither torch nor transformers.
    """

    def __init__(self, path: Path, manifest: Manifest | None, threads: int | None) -> None:
        super().__init__(path, manifest)
        import onnxruntime_genai

        self.threads, self.device = threads, device(path)
        self.runtime = f"ONNX Runtime GenAI {onnxruntime_genai.__version__} ({self.device})"

    @cached_property
    def model(self) -> Any:
        """The package in ONNX Runtime GenAI."""
        import onnxruntime_genai

        if self.device == "cuda" and CUDA not in providers(self.folder):
            raise ModelError(
                f"{self.folder} is for an NVIDIA GPU, which ONNX Runtime finds none of here. Serve it where one is, "
                "with onnxruntime-gpu and onnxruntime-genai-cuda, or export it with device=cpu."
            )
        entries: dict[str, Any] = {**_entries(), **({"intra_op_num_threads": self.threads} if self.threads else {})}
        try:
            config = onnxruntime_genai.Config(str(self.folder))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": entries}}}))
            return onnxruntime_genai.Model(config)
        except Exception as error:  # a dozen unrelated classes, as of ONNX Runtime
            raise ModelError(f"{self.folder} does not load: {_line(error)}. Export it again.") from None

    @cached_property
    def graph(self) -> Graph:
        """The package's graph in ONNX Runtime."""
        return Graph(self.folder, self.threads)

    def logits(self, ids_BT: Any) -> Floats:
        return self.graph.logits(ids_BT)[0]

    def _begin(self, ids_BT: Tokens, limit: int) -> tuple[Floats, Any]:
        import onnxruntime_genai

        params = onnxruntime_genai.GeneratorParams(self.model)
        several = len(ids_BT) > 1
        # min_length: of several texts none ends before the others, as the runtime would have it
        params.set_search_options(
            max_length=limit, min_length=limit if several else 0, batch_size=len(ids_BT), do_sample=False,
            chunk_size=0 if several or self.device != "cpu" else CHUNK,
        )  # fmt: skip
        generator = onnxruntime_genai.Generator(self.model, params)
        generator.append_tokens(ids_BT.astype(np.int32))
        return _last(generator), generator

    def _go_on(self, state: State, token: int | None) -> Floats:
        if len(state.logits_BV) > 1:
            state.cache.generate_next_token()  # it takes no tokens from outside after the first
        else:
            token = int(state.logits_BV[0].argmax()) if token is None else token
            state.cache.append_tokens(np.array([[token]], dtype=np.int32))
        return _last(state.cache)


def _last(generator: Any) -> Floats:
    """[B, V] behind the last token, which the model is run for if it was not yet."""
    logits_BTV = np.asarray(generator.get_logits(), dtype=np.float32)
    last_BV: Floats = logits_BTV[:, -1].copy()  # the next step writes into the same buffer
    return last_BV


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")[:300]


def ends(folder: Path) -> frozenset[int]:
    """Every token that config.json and generation_config.json call an end."""
    file = folder / "generation_config.json"
    more = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found: set[int] = set()
    for ids in (hf.read_config(folder).get("eos_token_id"), more.get("eos_token_id")):
        found |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return frozenset(int(number) for number in found)


def whole(text: str) -> str:
    """The text with lone surrogates (half characters, which JSON can carry) replaced for the tokenizer."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def load(path: Path, threads: int | None = None) -> LanguageModel:
    """The language model of a sealed directory. Raises ModelError if it is none."""
    path = Path(path)
    manifest = artifact.read(path)
    if manifest.task != decoder.TASK:
        raise ModelError(f"{path} is no language model but one for {manifest.task or 'no task'}.")
    if manifest.format not in ("hf", "genai"):
        raise ModelError(f"{path} is of format {manifest.format}, which gives no text. Name an hf or genai model.")
    kind = GenaiLanguageModel if manifest.format == "genai" else TorchLanguageModel
    return kind(path, manifest, threads)


def windows(tokenizer: Tokenizer, texts: Sequence[str], length: int, count: int = 0, seed: int = 0) -> Tokens:
    """int64 [N, length]: the texts one behind the other, each ended by the end token, cut into windows.

    With `count` so many windows at most are drawn, by seed. Raises DataError if the text fills no window.
    """
    stream: list[int] = []
    for text in texts:
        stream += tokenizer.encode(text)
        if tokenizer.eos is not None:
            stream.append(tokenizer.eos)
    number = len(stream) // length
    if number == 0:
        raise DataError(
            f"the text is {len(stream)} tokens, which fill no window of {length}. Give more text, or shorter windows."
        )
    whole = np.asarray(stream[: number * length], dtype=np.int64).reshape(number, length)
    if count and count < number:
        whole = whole[np.sort(np.random.default_rng(seed).permutation(number)[:count])]
    return whole
