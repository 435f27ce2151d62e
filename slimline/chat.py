"""Messages as a model was taught to read them: its chat template, rendered in a sandbox.

A template comes with the model, from outside, and is a program in Jinja's language: it runs where it can neither change
anything nor reach past the values it is given.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimline.errors import DataError, ModelError

Message = Mapping[str, Any]
"""{"role": "user", "content": "..."}"""
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def template(folder: Path) -> str | None:
    """The chat template of a model, from a file of its own or from tokenizer_config.json; None if it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = _settings(folder).get("chat_template")
    if isinstance(found, list):  # several by name
        named = {one.get("name"): one.get("template") for one in found}
        found = named.get("default", next(iter(named.values()), None))
    return None if found is None else str(found)


def render(folder: Path, messages: Sequence[Message]) -> str:
    """The prompt that asks the model for the next message. Raises ModelError where it has no working template."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    check(messages)
    source = template(folder)
    if source is None:
        raise ModelError(f"{folder} has no chat template, so it was not taught to chat. Give it a text, not messages.")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    values = {name: _text(token) for name, token in _settings(folder).items() if name in TOKENS}
    plain = [dict(message) for message in messages]
    try:
        return environment.from_string(source).render(messages=plain, add_generation_prompt=True, **values)
    except DataError:
        raise
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise ModelError(
            f"the chat template of {folder} cannot render these messages ({' '.join(str(error).split())[:200]}). "
            "Mend the template, or give a text, not messages."
        ) from None


def check(messages: Any) -> None:
    """Raise DataError for what is not a list of messages."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise DataError(f"messages are {messages!r}, not a list of at least one role and content.")
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"message {at} is {message!r}. Send a role and a content, both text.")


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _text(token: Any) -> str:
    """A special token, which is a text or a description of one."""
    return str(token.get("content") or "") if isinstance(token, dict) else str(token or "")


def _refuse(message: str) -> str:
    raise DataError(f"the model's chat template refuses these messages: {' '.join(str(message).split())[:200]}.")


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # not Jinja's own, which escapes for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
