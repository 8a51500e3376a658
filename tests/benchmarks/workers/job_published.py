"""The GSM8K job with the published package: load, influence over all checkpoints, the table.

Rows are read and made into bytes as the recipe's tokenizer does, and sorted by length, so that it
pads as little as it can: more than its README asks of a user.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from answer import Deed, serve
from recipe import build
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sdi import CheckpointSpec, ProjectedTracInSDI

PAD, BEGIN, END, IGNORED = 256, 257, 258, -100
Row = tuple[Tensor, Tensor]


def read(job: dict[str, Any]) -> list[Row]:
    """Ids and labels (T,) of every row; the question is no target."""
    found = []
    for line in Path(job["data"]).read_text().splitlines():
        row = json.loads(line)
        prompt, response = f"{row['question']}\n".encode(), row["answer"].encode()
        ids = torch.tensor([BEGIN, *prompt, *response, END])
        labels = ids.clone()
        labels[: 1 + len(prompt)] = IGNORED
        found.append((ids[: job["tokens"]], labels[: job["tokens"]]))
    return found


def usable(rows: list[Row]) -> list[Row]:
    """Those with a target: a question of all the tokens leaves none, and a loss of 0/0."""
    return [row for row in rows if bool((row[1][1:] != IGNORED).any())]


def padded(rows: list[Row]) -> Row:
    """Ids and labels (B, T), padded on the right."""
    sequences = zip(*rows, strict=True)
    ids, labels = (
        nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)
        for tensors, value in zip(sequences, (PAD, IGNORED), strict=True)
    )
    return ids, labels


def per_row(model: nn.Module, batch: Row) -> Tensor:
    """Losses (B,): the mean over a row's targets."""
    logits, labels = model(batch[0])[:, :-1], batch[1][:, 1:]
    each = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    return each.sum(1) / (labels != IGNORED).sum(1)


def make(job: dict[str, Any]) -> dict[str, Deed]:
    """`work`: the whole job on the first `rows` rows, in batches of `size` rows."""

    def work(rows: int, size: int, checkpoints: int) -> dict[str, Any]:
        begin = time.perf_counter()
        every = read(job)
        train, query = (usable(part) for part in (every[:rows], every[-job["queries"] :]))
        order = sorted(range(len(train)), key=lambda row: len(train[row][0]))
        train = [train[row] for row in order]
        load = time.perf_counter() - begin
        model: Any = build(job)
        estimate = ProjectedTracInSDI(
            model=model, target_modules=model.body, projection_size=job["dim"]
        )
        found = estimate.influence_across_checkpoints(
            checkpoints=[CheckpointSpec(f"{p}.pt", 1.0) for p in job["checkpoints"]][:checkpoints],
            train_loader=DataLoader(train, batch_size=size, collate_fn=padded),  # type: ignore[arg-type]
            query_loader=DataLoader(query, batch_size=size, collate_fn=padded),  # type: ignore[arg-type]
            loss_fn=per_row,
            mode="sdi",
        )
        totals = torch.empty(len(train))
        totals[order] = found.tracin.mean(1)
        seconds = time.perf_counter() - begin
        return {"totals": totals.tolist(), "phases": {"load": load}, "seconds": seconds}

    return {"work": work}


if __name__ == "__main__":
    serve(make)
