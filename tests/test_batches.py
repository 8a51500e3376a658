from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curate.batches import batches, padded, plan, width
from curate.errors import UsageError
from curate.examples import DataSpec, ExampleSet, load_examples


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExampleSet]:
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    words = ["a" * (1 + (7 * i) % 23) + str(i) for i in range(60)]
    path.write_text("prompt,response\n" + "".join(f"q{i},{w}\n" for i, w in enumerate(words)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(path.parent / "cache"))
        yield load_examples(DataSpec(path=str(path), mask_prompt=True))


@given(st.lists(st.integers(1, 300), max_size=80), st.integers(1, 1000))
def test_a_plan_takes_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    """Every row is in exactly one batch, and only a row too long by itself passes the budget."""
    array = np.asarray(lengths, dtype=np.int64)
    groups = plan(array, budget)
    assert sorted(int(at) for group in groups for at in group) == list(range(len(lengths)))
    most = min(max(lengths, default=0), budget)
    wide = [len(g) * width(int(array[g].max()), most) for g in groups]
    assert all(
        w <= budget or int(array[g].max()) > budget for w, g in zip(wide, groups, strict=True)
    )
    assert all(len(g) == 1 or w <= budget for w, g in zip(wide, groups, strict=True))


@pytest.mark.parametrize(("budget", "most"), [(2048, 0.005), (8192, 0.02), (32768, 0.065)])
def test_little_is_padding(budget: int, most: float) -> None:
    """Of a shard of 1024 rows of 125 to 512 tokens, few padded tokens are no row's own."""
    lengths = np.random.default_rng(0).integers(125, 513, 1024)
    groups = plan(lengths, budget)
    padded_tokens = sum(len(group) * int(lengths[group].max()) for group in groups)
    assert lengths.sum() <= padded_tokens < (1 + most) * lengths.sum()
    rounded = sum(len(g) * width(int(lengths[g].max()), int(lengths.max())) for g in groups)
    assert padded_tokens <= rounded < 1.025 * padded_tokens


def test_few_widths() -> None:
    """Whatever the lengths, a sixteenth is added at most, and never more than the longest has."""
    lengths = range(1, 5001)
    widths = [width(length, 5000) for length in lengths]
    assert all(n <= w <= min(5000, n + n // 16) for n, w in zip(lengths, widths, strict=True))
    assert widths == sorted(widths)
    assert len(set(widths)) == 31 + 16 * 7 + 5  # to 31; seven octaves; 4096 to 4864 and the longest
    assert width(700, 600) == 700


def test_batches_are_no_wider_than_the_longest_row(examples: ExampleSet) -> None:
    """A model may have no positions beyond it; shorter batches come in the rounded widths."""
    most = int(examples.lengths.max())
    found = {batch.shape[1] for batch in batches(examples, budget_tokens=64)}
    assert max(found) == most
    assert found == {width(wide, most) for wide in found}


def test_batches_do_not_depend_on_the_order_of_rows(examples: ExampleSet) -> None:
    """Rows asked for in another order come in the same batches, with the ids that are theirs."""
    one = list(batches(examples, budget_tokens=128, rows=range(10, 50)))
    two = list(batches(examples, budget_tokens=128, rows=list(range(49, 9, -1))))
    assert [b.ids for b in one] == [b.ids for b in two]
    table = examples.table["id"].to_list()
    assert all(table[row] == id_ for b in one for row, id_ in zip(b.rows, b.ids, strict=True))
    assert sum(b.tokens for b in one) == examples.lengths[10:50].sum()


@pytest.mark.parametrize("budget", [1, 64, 5000])
def test_padding_is_masked_and_no_target(examples: ExampleSet, budget: int) -> None:
    """Whatever the budget, each row's tokens and labels are whole, and the rest is padding."""
    for batch in batches(examples, budget_tokens=budget):
        for at, row in enumerate(batch.rows):
            ids, labels = examples.tokens(int(row))
            width = len(ids)
            found = {name: tensor[at] for name, tensor in batch.tensors.items()}
            assert found["input_ids"][:width].tolist() == ids.tolist()
            assert found["labels"][:width].tolist() == labels.tolist()
            assert found["attention_mask"].sum() == width
            assert (found["input_ids"][width:] == examples.pad_id).all()
            assert (found["labels"][width:] == -100).all()


def test_tensors_are_int64_on_the_right_shape(examples: ExampleSet) -> None:
    """Tensors are (B, T) int64, and another padding id is taken where asked."""
    first = next(batches(examples, budget_tokens=400, pad_id=7))
    shapes = {tuple(tensor.shape) for tensor in first.tensors.values()}
    assert len(shapes) == 1
    assert {tensor.dtype for tensor in first.tensors.values()} == {torch.int64}
    rows = [examples.tokens(0), (np.zeros(50, np.int32), np.zeros(50, np.int32))]
    assert padded(rows, 7)["input_ids"][0, -1] == 7


def test_a_budget_below_one_is_refused(examples: ExampleSet) -> None:
    """A budget that no row fits is a usage error that says so."""
    with pytest.raises(UsageError, match="budget of a batch is 0"):
        next(batches(examples, budget_tokens=0))


def test_persisted_and_in_memory_sets_batch_alike(examples: ExampleSet, tmp_path: Path) -> None:
    """Batches from memory-mapped files equal those from memory, tensor for tensor."""
    stored = load_examples(examples.spec, tmp_path / "set")
    both = zip(batches(examples, budget_tokens=99), batches(stored, budget_tokens=99), strict=True)
    for one, two in both:
        assert one.ids == two.ids
        assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in one.tensors)
