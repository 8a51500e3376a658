"""Which columns hold an example's content, and what a row of them says.

A row's content is a `Document` (still to be tokenised), an `Encoded` (token columns, as they are),
or a string: the reason why the row cannot be used. Empty rows are the data's business and get a
reason; columns of the wrong kind are the user's and raise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from curate.errors import DataError, UsageError
from curate.sources import DataSpec, require_column
from curate.tokens import IGNORE, Document, Encoded, Tokenizer

Kind = Literal["text", "pair", "messages", "tokens"]
Content = Document | Encoded | str

# Looked for in this order where the spec names no column.
_USUAL: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("tokens", ("input_ids",)),
    ("messages", ("messages",)),
    ("pair", ("prompt", "response")),
    ("pair", ("prompt", "completion")),
    ("pair", ("instruction", "response")),
    ("pair", ("question", "answer")),
    ("text", ("text",)),
)


@dataclass(frozen=True)
class Columns:
    """The kind of content, and the columns that hold it: for tokens (ids, labels, mask), where
    labels and mask may be "".
    """

    kind: Kind
    names: tuple[str, ...]

    @property
    def present(self) -> tuple[str, ...]:
        """The columns to be read."""
        return tuple(name for name in self.names if name)


def content_columns(spec: DataSpec, names: Sequence[str]) -> Columns:
    """The content columns of `spec` in a dataset with columns `names`. Raises UsageError where the
    spec names several kinds or half of one, DataError for a column that is not there.
    """
    found = _named(spec, names) or _usual(spec, names)
    if spec.mask_prompt and found.kind in ("text", "tokens"):
        raise UsageError(
            f"mask_prompt needs `prompt` and `response`, or `messages`; "
            f"{', '.join(spec.paths)} is read by its column {found.names[0]!r}"
        )
    return found


def _named(spec: DataSpec, names: Sequence[str]) -> Columns | None:
    kinds: dict[Kind, dict[str, str | None]] = {
        "text": {"text": spec.text},
        "pair": {"prompt": spec.prompt, "response": spec.response},
        "messages": {"messages": spec.messages},
        "tokens": {"input_ids": spec.input_ids},
    }
    asked = {kind: keys for kind, keys in kinds.items() if any(keys.values())}
    if not asked:
        return None
    if len(asked) > 1:
        keys = [key for fields in asked.values() for key, value in fields.items() if value]
        raise UsageError(f"{' and '.join(keys)} cannot be given together; name one kind of content")
    (kind, fields), *_ = asked.items()
    if not all(fields.values()):
        missing = [key for key, value in fields.items() if not value]
        raise UsageError(f"`prompt` and `response` go together; `{missing[0]}` is missing")
    columns = tuple(
        require_column(str(column), key, names, spec.paths) for key, column in fields.items()
    )
    return _with_labels(spec, names, columns) if kind == "tokens" else Columns(kind, columns)


def _usual(spec: DataSpec, names: Sequence[str]) -> Columns:
    for kind, columns in _USUAL:
        if set(columns) <= set(names):
            return (
                _with_labels(spec, names, columns) if kind == "tokens" else Columns(kind, columns)
            )
    raise DataError(
        f"{', '.join(spec.paths)} has none of the usual columns (it has {', '.join(names)}); "
        "name them: `text`, or `prompt` and `response`, or `messages`, or `input_ids`"
    )


def _with_labels(spec: DataSpec, names: Sequence[str], columns: tuple[str, ...]) -> Columns:
    def optional(key: str, named: str | None) -> str:
        if named is not None:
            return require_column(named, key, names, spec.paths)
        return key if key in names else ""

    extra = (optional("labels", spec.labels), optional("attention_mask", spec.attention_mask))
    return Columns("tokens", (*columns, *extra))


def row_content(
    columns: Columns,
    row: Mapping[str, Any],
    spec: DataSpec,
    tokenizer: Tokenizer | None,
    where: str,
) -> Content:
    """The content of one row; `where` names the row in errors."""
    values = [row[name] if name else None for name in columns.names]
    if columns.kind == "tokens":
        return _tokens(values, where)
    if tokenizer is None:
        raise UsageError("text needs a tokenizer: 'bytes' or 'hf:DIR'")
    if columns.kind == "messages":
        return _messages(values[0], spec, tokenizer, where)
    for name, value in zip(columns.names, values, strict=True):
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{where}: column {name!r} holds {type(value).__name__} ({value!r:.40}), "
                "expected text"
            )
    first, last = values[0] or "", values[-1] or ""
    if not last.strip():
        return f"{columns.names[-1]} is empty"
    if columns.kind == "text":
        return Document(first, None, spec.eos)
    prompt = f"{first}{spec.separator}"
    text = f"{prompt}{last}"
    return Document(text, ((len(prompt), len(text)),) if spec.mask_prompt else None, spec.eos)


def _messages(value: Any, spec: DataSpec, tokenizer: Tokenizer, where: str) -> Content:
    if not value:
        return "messages is empty"
    shaped = isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn
        for turn in value
    )
    if not shaped:
        raise DataError(f"{where}: messages is {value!r:.80}, expected a list of role and content")
    if not any(str(turn["content"] or "").strip() for turn in value):
        return "messages is empty"
    document = tokenizer.chat(value, spec.mask_prompt)
    return replace(document, ends=document.ends and spec.eos)


def _tokens(values: Sequence[Any], where: str) -> Content:
    ids, labels, mask = values
    if ids is None or len(ids) == 0:
        return "input_ids is empty"
    for name, other in (("labels", labels), ("attention_mask", mask)):
        if other is not None and len(other) != len(ids):
            raise DataError(f"{where}: {len(ids)} input_ids but {len(other)} {name}")
    try:
        encoded = Encoded(_int32(ids), _int32(ids if labels is None else labels))
    except (TypeError, ValueError, OverflowError) as cause:
        raise DataError(f"{where}: token columns must hold integers; seen {ids!r:.60}") from cause
    if encoded.ids.min() < 0:
        raise DataError(f"{where}: input_ids holds {encoded.ids.min()}; token ids are 0 or more")
    wrong = (encoded.labels < 0) & (encoded.labels != IGNORE)
    if wrong.any():
        raise DataError(f"{where}: labels holds {encoded.labels[wrong][0]}; expected ids or -100")
    return encoded if mask is None else _unpadded(encoded, np.asarray(mask) != 0, where)


def _int32(values: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{array.dtype} are not integers")
    if len(array) and (array.max() > np.iinfo(np.int32).max or array.min() < -(2**31)):
        raise OverflowError("beyond int32")
    return array.astype(np.int32)


def _unpadded(encoded: Encoded, own: np.ndarray[Any, np.dtype[np.bool_]], where: str) -> Content:
    """Padding is taken off either end; a batch puts its own on."""
    places = np.flatnonzero(own)
    if len(places) == 0:
        return "attention_mask is all zero"
    if places[-1] - places[0] + 1 != len(places):
        raise DataError(f"{where}: attention_mask has a hole; only padding at the ends is read")
    keep = slice(int(places[0]), int(places[-1]) + 1)
    return Encoded(encoded.ids[keep], encoded.labels[keep])
