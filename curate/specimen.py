"""A few rows to look at a model with: made up, or read from a file; and the loss for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sdi
from curate.batches import Batch, alone_and_padded, batches
from curate.callables import load_callable
from curate.errors import UsageError

#: Tokens of a made-up row.
TOKENS = 16

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Specimen:
    """A batch with what it was made from: tensors (B, T), B ids, and a phrase that says it."""

    tensors: dict[str, Tensor]
    ids: tuple[str, ...]
    made_from: str
    pad_id: int = 0

    def padded_half(self) -> tuple[Batch, Batch]:
        """The first half of the first row, alone and padded to the width of the row.

        Every token is a target: those of the row may all be in its other half.
        """
        own = int(self.tensors["attention_mask"][0].sum())
        ids = self.tensors["input_ids"][0, : max(2, own // 2)].cpu().numpy()
        return alone_and_padded(0, self.ids[0], (ids, ids), self.pad_id, own)


def chosen_loss(name: str | None, model: nn.Module, *, trust_code: bool) -> tuple[Loss, str]:
    """The loss for a name and what it is called; without one the model's class name decides.

    Args:
        name: causal, masked, `file.py:callable`, or None.
        model: a class named …ForMaskedLM has the masked loss.
        trust_code: whether a file that is not shipped with the package may run.
    """
    if name is None:
        name = "masked" if type(model).__name__.endswith("ForMaskedLM") else "causal"
    known: dict[str, Loss] = {"causal": sdi.causal_lm_loss, "masked": sdi.masked_lm_loss}
    if name in known:
        return known[name], name
    if ".py:" not in name:
        raise UsageError(f"--loss {name!r}; expected causal, masked or file.py:callable")
    return load_callable(name, Path.cwd(), trust_code=trust_code), name


def made_up(model: nn.Module, rows: int, tokens: int, *, masked: bool) -> Specimen:
    """Random tokens of the model's vocabulary, the same for the same model every time.

    With `masked` every third position is a target, else all are.

    Raises UsageError where the model says nothing of its vocabulary.
    """
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
        if embedding is None:
            raise UsageError(
                "the model has no vocab_size and no embedding, so no batch can be made up for it; "
                "give rows of yours with --data"
            )
        size = embedding.num_embeddings
    ids = torch.randint(0, size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int):  # models treat it otherwise than text
        ids[ids == padding] = (padding + 1) % size
    labels = ids.clone()
    if masked:
        labels[:, torch.arange(tokens) % 3 != 1] = -100
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    names = tuple(f"row-{number + 1}" for number in range(rows))
    made_from = f"{rows} made-up rows of {tokens} random tokens"
    return Specimen(tensors, names, made_from, padding if isinstance(padding, int) else 0)


def from_file(path: str, source: str, rows: int, tokens: int | None) -> Specimen:
    """The first rows of a data file, read as a recipe would.

    Args:
        path: JSONL, Parquet, CSV, a directory or a hub name.
        source: of the model; an `hf:` directory with a tokenizer lends it, else text is bytes.
        rows: how many.
        tokens: the most of a row; all where None.
    """
    from curate.examples import load_examples
    from curate.sources import DataSpec
    from curate.strict import validated

    raw: dict[str, Any] = {"path": path, "limit": rows, "tokenizer": _tokenizer(source)}
    spec = validated(DataSpec, raw | ({"max_tokens": tokens} if tokens else {}), "data")
    examples = load_examples(spec, name="doctor")
    if len(examples) < 2:
        raise UsageError(
            f"{path} has {len(examples)} row; expected two or more, since one alone cannot show "
            f"that rows influence each other"
        )
    longest = int(max(examples.lengths))
    batch = next(batches(examples, budget_tokens=longest * len(examples)))
    text = f"{len(batch.ids)} rows of {Path(path).name}, at most {longest} tokens"
    return Specimen(batch.tensors, tuple(batch.ids), text, examples.pad_id)


def _tokenizer(source: str) -> str:
    folder = Path(source.removeprefix("hf:"))
    has_one = any((folder / f"tokenizer{end}").is_file() for end in (".json", "_config.json"))
    return source if source.startswith("hf:") and has_one else "bytes"
