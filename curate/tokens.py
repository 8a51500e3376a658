"""Text to token ids: bytes (built in) or a Hugging Face tokenizer (`hf:DIR`), targets marked.

Both take a `Document`, a text whose targets are spans of characters, and answer with ids and labels
of the same length. Spans, and not separately tokenised pieces, because a tokenizer that sees the
whole text gives the tokens that the model was trained on; a token is a target if it holds any part
of a target span. Labels are not shifted: that is the loss's to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from curate.errors import UsageError

PAD, BOS, EOS = 256, 257, 258
VOCAB_SIZE = 259  # of the byte tokenizer: 256 bytes, then PAD, BOS, EOS
IGNORE = -100  # the label of a token that is no target

Ids = NDArray[np.int32]
Spans = tuple[tuple[int, int], ...]
Message = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """A text; `targets` are half-open spans of characters, None where everything is a target.

    `ends`: an end-of-text token follows, and is a target. `rendered`: special tokens are already
    part of the text (a chat template wrote it), so that none is added in front.
    """

    text: str
    targets: Spans | None = None
    ends: bool = True
    rendered: bool = False


@dataclass(frozen=True)
class Encoded:
    """Ids and labels of one row, int32 (T,) each; labels are -100 where a token is no target."""

    ids: Ids
    labels: Ids

    def cut(self, max_tokens: int | None) -> Encoded:
        """The first `max_tokens` tokens."""
        return Encoded(self.ids[:max_tokens], self.labels[:max_tokens])

    @property
    def targets(self) -> int:
        """How many tokens are predicted: the first token never is."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE))


class Tokenizer(Protocol):
    """What a tokenizer must be able to do."""

    vocab_size: int
    pad_id: int

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """One `Encoded` for each document."""
        ...

    def chat(self, messages: Sequence[Message], mask_prompt: bool) -> Document:
        """The document of a conversation; with `mask_prompt` only the assistant's turns count."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        ...


def load_tokenizer(name: str | None) -> Tokenizer:
    """The tokenizer called `name`: "bytes" or "hf:DIR" (a directory or a hub name)."""
    if name == "bytes":
        return ByteTokenizer()
    if name is not None and name.startswith("hf:") and len(name) > 3:
        return HFTokenizer(name.removeprefix("hf:"))
    raise UsageError(
        f"{name!r} is not a tokenizer; expected 'bytes' or 'hf:DIR'"
        + (" (null is for token columns only)" if name is None else "")
    )


class ByteTokenizer:
    """UTF-8 bytes, with BOS in front and EOS at the end; nothing to download, nothing unknown."""

    vocab_size = VOCAB_SIZE
    pad_id = PAD

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """BOS, the text's bytes, EOS if the document ends."""
        return [self._encode(document) for document in documents]

    def _encode(self, document: Document) -> Encoded:
        raw = document.text.encode("utf-8", "surrogatepass")
        ids = np.empty(len(raw) + 1 + document.ends, dtype=np.int32)
        ids[0], ids[1 : len(raw) + 1] = BOS, np.frombuffer(raw, dtype=np.uint8)
        ids[len(raw) + 1 :] = EOS
        if document.targets is None:
            return Encoded(ids, ids.copy())
        labels = np.full_like(ids, IGNORE)
        for start, stop in document.targets:
            first, last = (1 + _bytes_before(document.text, at) for at in (start, stop))
            labels[first:last] = ids[first:last]
        if document.ends:
            labels[-1] = EOS
        return Encoded(ids, labels)

    def chat(self, messages: Sequence[Message], mask_prompt: bool) -> Document:
        """One line per message, `role: content`; only the contents are targets under a mask."""
        text, spans = "", []
        for message in messages:
            text += f"{message['role']}: "
            start = len(text)
            text += f"{message['content'] or ''}\n"
            if message["role"] == "assistant":
                spans.append((start, len(text)))
        if not mask_prompt:
            return Document(text)
        # Without an answer at the end, the end of the text is not the assistant's to predict.
        return Document(text, tuple(spans), messages[-1]["role"] == "assistant")

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are not UTF-8 (a character cut in two) are shown as a replacement mark."""
        return bytes(int(i) for i in ids if 0 <= int(i) < 256).decode("utf-8", "replace")


def _bytes_before(text: str, at: int) -> int:
    return len(text[:at].encode("utf-8", "surrogatepass"))


class HFTokenizer:
    """A tokenizer of `transformers`, from a directory or by hub name; runs no code from either."""

    def __init__(self, name: str) -> None:
        """Load `name`. Raises UsageError where it cannot be loaded."""
        self.name = name
        self._inner = _pretrained(name)
        eos, pad = self._inner.eos_token_id, self._inner.pad_token_id
        self.eos_id: int | None = None if eos is None else int(eos)
        self.pad_id = int(pad if pad is not None else eos if eos is not None else 0)
        self.vocab_size = len(self._inner)

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """The tokenizer's own special tokens, and its end token where the document ends."""
        rendered = [document.rendered for document in documents]
        if any(rendered) != all(rendered):
            raise ValueError("rendered and plain documents cannot be encoded together")
        masked = any(document.targets is not None for document in documents)
        if masked and not self._inner.is_fast:
            raise UsageError(
                f"the tokenizer {self.name!r} does not say which characters its tokens hold, so "
                "that prompts cannot be masked; save a fast one, or leave mask_prompt out"
            )
        found = self._inner(
            [document.text for document in documents],
            add_special_tokens=not any(rendered),
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=masked,
            verbose=False,
        )
        offsets = found["offset_mapping"] if masked else [[]] * len(documents)
        return [
            self._encoded(document, ids, where)
            for document, ids, where in zip(documents, found["input_ids"], offsets, strict=True)
        ]

    def _encoded(
        self, document: Document, found: Sequence[int], offsets: Sequence[tuple[int, int]]
    ) -> Encoded:
        ids = np.asarray(found, dtype=np.int32)
        labels = ids.copy()
        if document.targets is not None:
            labels[~_within(offsets, document.targets)] = IGNORE
        if not document.ends or self.eos_id is None:
            return Encoded(ids, labels)
        if len(ids) and ids[-1] == self.eos_id:
            labels[-1] = self.eos_id
            return Encoded(ids, labels)
        return Encoded(_append(ids, self.eos_id), _append(labels, self.eos_id))

    def chat(self, messages: Sequence[Message], mask_prompt: bool) -> Document:
        """The tokenizer's chat template, which writes an end of its own."""
        text = self._render(messages)
        if not mask_prompt:
            return Document(text, None, ends=False, rendered=True)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], add_generation_prompt=True)
            after = self._render(messages[: i + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise UsageError(
                    f"the chat template of {self.name!r} writes earlier turns differently once "
                    "later ones follow, so that prompts cannot be masked; leave mask_prompt out, "
                    "or give token columns with labels"
                )
            spans.append((len(before), len(after)))
        return Document(text, tuple(spans), ends=False, rendered=True)

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        if not self._inner.chat_template:
            raise UsageError(f"the tokenizer {self.name!r} has no chat template for `messages`")
        if not messages:  # templates may refuse an empty conversation
            return ""
        return str(self._inner.apply_chat_template(list(messages), tokenize=False, **options))

    def decode(self, ids: Sequence[int]) -> str:
        """The tokenizer's own decoding."""
        return str(self._inner.decode([int(i) for i in ids], skip_special_tokens=True))


def _pretrained(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as cause:
        raise UsageError("a tokenizer 'hf:…' needs transformers: install the extra `hf`") from cause
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as cause:  # whatever the loaders of a dozen file formats raise
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise UsageError(f"no tokenizer could be loaded from {name!r}: {lines[0]}") from cause


def _within(offsets: Sequence[tuple[int, int]], spans: Spans) -> NDArray[np.bool_]:
    """Which tokens hold a character of a span, (T,); special tokens hold none."""
    places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    inside = np.zeros(len(places), dtype=bool)
    for start, stop in spans:
        inside |= (places[:, 1] > start) & (places[:, 0] < stop)
    return inside & (places[:, 1] > places[:, 0])


def _append(values: Ids, value: int) -> Ids:
    return np.append(values, np.int32(value)).astype(np.int32, copy=False)
