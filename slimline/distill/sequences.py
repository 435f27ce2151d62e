"""Distillation by whole sequences: the teacher goes on from the beginnings of documents, and the student reads that.

What a teacher says is simpler than what people write, and a small model learns it better (Kim and Rush, 2016, arXiv
1606.07947). It goes through text, so the teacher may have another vocabulary. What it said is kept and used again by
key. Costs the teacher's speaking, token by token, once; then the student reads it like any text.

Shapes: B = texts, P = tokens of a prompt, A = tokens of an answer.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from slimline import chunks, data, decoder, hf, language, sheets, speech, tuition
from slimline.errors import DataError
from slimline.sheets import Document
from slimline.technique import Metrics, Stored, track

NEEDS = GIVES = "hf"
RESUMES = True


class Config(tuition.Tuition):
    """Options of distill.sequences."""

    teacher: Stored = Field(description="model that speaks")
    speaking: Literal["greedy", "beam", "sample"] = Field("greedy", description="how the teacher chooses its words")
    beams: int = Field(4, ge=2, le=64, description="of beam: answers kept at once")
    temperature: float = Field(1.0, gt=0, le=100, description="of sample: softens what words are drawn from")
    answers: int = Field(1, ge=1, le=64, description="of sample: answers to each prompt")
    prompt: int = Field(32, ge=1, description="tokens of a document that are given; shorter documents are left out")
    answer: int = Field(96, ge=1, description="tokens that follow at most")
    together: int = Field(
        16, ge=1, le=1024, description="texts that the teacher goes on with at once, kept in one file"
    )
    length: int = Field(512, ge=8, description="tokens of a sheet, on which texts are packed")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Teach the student in `source` and write it to `out`."""
    return tuition.everywhere(lambda: work(source, out, config), out)


def work(source: Path, out: Path, config: Config) -> Metrics:
    """What every process does."""
    scratch = out / "work"
    student, tokenizer = tuition.student(source), language.Tokenizer(source)
    said = speak(config, Path(config.cache) if config.cache else scratch)
    documents = [understand(tokenizer, *one) for one in said]
    text = sheets.lay(documents, config.length, tokenizer.eos or 0)
    validation = tuition.measured(config, tokenizer, config.length)
    metrics = tuition.fit(student, tuition.Reading(text), config, validation, scratch, "distilling")
    metrics |= {
        "parameters": float(sum(p.numel() for p in student.parameters())),
        "num_texts": float(len(said)),
        "learned_tokens": float(text.counted_NT.sum()),
    }
    tuition.write(student, source, out)
    shutil.rmtree(scratch, ignore_errors=True)
    return metrics


def speak(config: Config, folder: Path) -> list[tuple[str, str, bool]]:
    """(prompt, answer, whether it came to an end) for every document of the train split that is long enough."""
    teacher = Path(config.teacher)
    tokenizer = language.Tokenizer(teacher)
    texts = data.documents(Path(config.data), "train").texts
    prompts = [ids[: config.prompt] for ids in map(tokenizer.encode, texts) if len(ids) > config.prompt]
    if not prompts:
        raise DataError(f"no document is longer than the {config.prompt} tokens of a prompt. Lower `prompt`.")
    answers = config.answers if config.speaking == "sample" else 1
    ids_NP = np.repeat(np.asarray(prompts, dtype=np.int64), answers, axis=0)
    how = config.model_dump(mode="json", include={"speaking", "beams", "temperature", "answer", "together", "seed"})
    made_of = chunks.key(teacher=chunks.identity(teacher), ids=ids_NP, precision=tuition.precision(config), **how)
    kept = chunks.Chunks(folder, made_of)
    number, (mine, of) = -(-len(ids_NP) // config.together), tuition.share()
    missing = [i for i in range(number) if i not in kept and i % of == mine]
    model: Any = decoder.load(teacher) if missing else None
    for i in track(missing, "the teacher speaks"):
        rows = range(i * config.together, min(len(ids_NP), (i + 1) * config.together))
        kept.write(i, _said(model, tokenizer, ids_NP, rows, config))
    tuition.wait()
    found = [kept.read(i) for i in range(number)]
    return [one for part in found for one in zip(part["prompt"], part["answer"], part["ended"].tolist())]


def _said(
    model: Any, tokenizer: language.Tokenizer, ids_NP: sheets.Whole, rows: range, config: Config
) -> dict[str, Any]:
    """Columns prompt and answer, text, and ended, uint8, for some rows."""
    import torch

    prompts_BP = torch.from_numpy(ids_NP[list(rows)]).to(hf.config_device(model))
    with tuition.casting(config)():
        if config.speaking == "beam":
            answers_BA, real_BA = speech.beam(model, prompts_BP, config.answer, tokenizer.eos, config.beams)
        else:
            drawn_BA = None
            if config.speaking == "sample":
                numbers = [np.random.default_rng([config.seed, row]).random(config.answer) for row in rows]
                drawn_BA = torch.from_numpy(np.stack(numbers)).to(prompts_BP.device)
            answers_BA, real_BA = speech.go_on(
                model, prompts_BP, config.answer, tokenizer.eos, drawn_BA, config.temperature
            )
    prompts = [tokenizer.decode(ids) for ids in prompts_BP.tolist()]
    wholes = [
        tokenizer.decode(prompt + [token for token, here in zip(ids, real) if here])
        for prompt, ids, real in zip(prompts_BP.tolist(), answers_BA.tolist(), real_BA.tolist())
    ]
    end = -1 if tokenizer.eos is None else tokenizer.eos
    return {
        "prompt": [whole[: len(prompt)] for whole, prompt in zip(wholes, prompts)],
        "answer": [whole[len(prompt) :] for whole, prompt in zip(wholes, prompts)],
        "ended": (answers_BA == end).any(dim=1).cpu().numpy().astype(np.uint8),
    }


def understand(tokenizer: language.Tokenizer, prompt: str, answer: str, ended: bool) -> Document:
    """The text in the student's tokens. Those are learned that reach into the answer, and the end if there was one."""
    read = tokenizer.fast.encode(prompt + answer)
    start = next((at for at, (_, last) in enumerate(read.offsets) if last > len(prompt)), len(read.ids))
    end = [tokenizer.eos] if ended and tokenizer.eos is not None else []
    return Document(read.ids + end, start)
