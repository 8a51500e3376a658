"""The shipped recipes: their data, their model, their training and their comparison."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes import arithmetic, compare, looped_gpt, training

TINY = {"context": 16, "width": 8, "heads": 2, "depth": 2}
COUNTS = {"easy": 30, "hard": 30, "wrong": 40, "boilerplate": 20}
CLEAN = {"easy": 10, "hard": 10}


def sets(seed: int = 0) -> dict[str, list[arithmetic.Problem]]:
    return arithmetic.make_sets(train=COUNTS, query=CLEAN, evaluation=CLEAN, seed=seed)


def rows(count: int = 12) -> training.Rows:
    generator = np.random.default_rng(0)
    tokens = [generator.integers(0, 256, 4 + n % 5).astype(np.int32) for n in range(count)]
    return training.Rows(tokens, tokens, np.ones(count, np.float32))


# -- data -----------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from(["easy", "hard"]))
@settings(max_examples=60, deadline=None)
def test_right_sources_are_right(seed: int, source: str) -> None:
    """The working and answer of easy and hard rows agree with Python's own arithmetic."""
    made = arithmetic.problem(random.Random(seed), source, source)
    chain = made.prompt.rstrip("=")
    assert int(made.answer) == eval(chain) % 10
    assert made.response[2::3] == "".join(map(str, arithmetic.solve(made.prompt)))
    assert arithmetic.STEPS[source][0] <= made.steps <= arithmetic.STEPS[source][1]


@given(st.integers(0, 10_000), st.sampled_from(["easy", "hard"]))
@settings(max_examples=60, deadline=None)
def test_wrong_rows_are_wrong(seed: int, kind: str) -> None:
    """A wrong row's first step and its answer both differ from the right ones."""
    made = arithmetic.problem(random.Random(seed), "wrong", kind)
    right = arithmetic.solve(made.prompt)
    assert made.response[2] != str(right[0])
    assert made.answer != str(right[-1])


def test_sources_have_their_counts() -> None:
    """Every source has as many rows as were asked for, and the clean sets hold nothing wrong."""
    made = sets()
    for source, count in COUNTS.items():
        assert sum(row.source == source for row in made["train"]) == count
    assert {row.source for name in ("query", "eval") for row in made[name]} == {"easy", "hard"}


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_sets_are_disjoint(seed: int) -> None:
    """No arithmetic prompt stands twice, in one set or in two."""
    prompts = [r.prompt for rows in sets(seed).values() for r in rows if r.steps]
    assert len(prompts) == len(set(prompts))


def test_generation_is_a_function_of_the_seed() -> None:
    """The same seed gives the same rows, another seed others."""
    assert sets(1) == sets(1)
    assert sets(1) != sets(2)


def test_a_larger_pool_leaves_the_clean_sets_alone() -> None:
    """Queries and evaluation do not change when more training rows are asked for."""
    more = {name: 2 * count for name, count in COUNTS.items()}
    grown = arithmetic.make_sets(train=more, query=CLEAN, evaluation=CLEAN, seed=0)
    assert grown["query"] == sets()["query"]
    assert grown["eval"] == sets()["eval"]


def test_too_many_easy_problems_are_refused() -> None:
    """A source that has run out of unused prompts is one clear error, not an endless loop."""
    with pytest.raises(ValueError, match="no unused easy problem"):
        arithmetic.make_sets(train={"easy": 4000}, query={}, evaluation={}, seed=0)


def test_rows_are_written_with_ids(tmp_path: Path) -> None:
    """A written set has one JSON object a line, each with an id of its own."""
    path = tmp_path / "data" / "query.jsonl"
    arithmetic.write_rows(sets()["query"], path, prefix="query")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"query-{n:05d}" for n in range(20)]
    assert not path.with_suffix(".partial").exists()


# -- model ----------------------------------------------------------------------------------------


def test_padding_does_not_change_real_tokens() -> None:
    """The logits of a row's own tokens are the same alone and padded beside a longer row."""
    model = looped_gpt.build(**TINY)
    batch = rows().batch([0, 4])
    length = int(batch["attention_mask"][0].sum())
    padded = model(batch["input_ids"], batch["attention_mask"])[0, :length]
    alone = model(batch["input_ids"][:1, :length])[0]
    assert batch["input_ids"].shape[1] > length
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_left_padding_and_long_rows_are_refused() -> None:
    """Padding on the left and rows beyond the context are errors that say what to do."""
    model = looped_gpt.build(**TINY)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="pad on the right"):
        model(ids, torch.tensor([[0, 1, 1, 1]]))
    with pytest.raises(ValueError, match="context is 16"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_the_body_is_called_depth_times() -> None:
    """One body, one set of weights, as many calls as the depth says."""
    model = looped_gpt.build(**{**TINY, "depth": 5})
    calls: list[int] = []
    handle = model.body.register_forward_hook(lambda *_: calls.append(1))
    model(torch.zeros(1, 3, dtype=torch.long))
    handle.remove()
    assert len(calls) == 5


def test_weights_come_from_their_seed_alone(tmp_path: Path) -> None:
    """Initial weights depend on `seed` only, and survive saving and loading bit by bit."""
    torch.manual_seed(1)
    first = looped_gpt.build(**TINY, seed=3)
    torch.manual_seed(2)
    second = looped_gpt.build(**TINY, seed=3)
    path = looped_gpt.save(first, tmp_path, step=7, learning_rate=0.25)
    other = looped_gpt.build(**TINY, seed=4)
    looped_gpt.load(other, path)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert torch.equal(value, other.state_dict()[name])
    assert json.loads((tmp_path / "training.json").read_text()) == {
        "step": 7,
        "learning_rate": 0.25,
    }


# -- training -------------------------------------------------------------------------------------


def trained(seed: int, directory: Path | None = None) -> list[float]:
    model = looped_gpt.build(**TINY)
    plan = training.Settings(steps=6, batch_rows=4, warmup=2, seed=seed)
    return training.train(model, rows(), plan, save_at=[3, 6], directory=directory)


def test_training_is_deterministic(tmp_path: Path) -> None:
    """Two trainings with one seed end with the same losses and the same weights."""
    first, second = trained(0, tmp_path / "a"), trained(0, tmp_path / "b")
    assert first == second
    for step in ("step-00003", "step-00006"):
        one = (tmp_path / "a" / step / "model.safetensors").read_bytes()
        assert one == (tmp_path / "b" / step / "model.safetensors").read_bytes()
    assert trained(1) != first


def test_every_pass_shows_every_row_once() -> None:
    """Batches cut from shuffled passes: after k·N rows each row was seen k times."""
    plan = training.Settings(steps=6, batch_rows=4)
    seen = [row for batch in training.schedule(12, plan) for row in batch]
    assert sorted(seen) == sorted([*range(12)] * 2)


def test_a_row_of_weight_zero_teaches_nothing() -> None:
    """Training with a row at weight zero ends where training without its gradient ends."""
    only = rows().select([0, 1], [1.0, 0.0])
    twice = rows().select([0, 0], [1.0, 0.0])
    plan = training.Settings(steps=3, batch_rows=2, warmup=1)
    results = []
    for chosen in (only, twice):
        model = looped_gpt.build(**TINY)
        training.train(model, chosen, plan)
        results.append(model.head.weight.detach())
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_the_learning_rate_never_reaches_zero() -> None:
    """It rises, peaks at its name and ends at its floor, so every checkpoint has a weight."""
    plan = training.Settings(steps=100, learning_rate=1.0, warmup=10, floor=0.1)
    rates = [plan.rate(step) for step in range(100)]
    assert max(rates) == pytest.approx(1.0)
    assert min(rates) > 0.09
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_training_on_nothing_is_refused() -> None:
    """No rows is an error that says so."""
    with pytest.raises(ValueError, match="no rows to train on"):
        training.train(looped_gpt.build(**TINY), rows(0), training.Settings(steps=1))


def test_asked_for_again_it_trains_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints that are there are kept, and made again only with `overwrite`."""
    from types import SimpleNamespace

    weights = tmp_path / "checkpoints" / "step-00002" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"old")
    monkeypatch.setattr(training.Rows, "of", lambda _: rows(4))
    monkeypatch.setattr("curate.examples.load_examples", lambda *_, **__: None)
    context = SimpleNamespace(
        run=tmp_path,
        overwrite=False,
        model=lambda: looped_gpt.build(**TINY, positions="waves"),
        specs=lambda: {"train": None},
        log=lambda _: None,
        progress=lambda *_: None,
    )
    plan = {"steps": 2, "batch_rows": 2, "save_at": (1.0,)}
    training.train_base(context, **plan)  # type: ignore[arg-type]
    assert weights.read_bytes() == b"old"
    context.overwrite = True
    training.train_base(context, **plan)  # type: ignore[arg-type]
    assert weights.read_bytes() != b"old"


# -- comparison -----------------------------------------------------------------------------------


def outcomes(curated: list[float], others: list[float]) -> list[compare.Outcome]:
    made = []
    for seed, (one, other) in enumerate(zip(curated, others, strict=True)):
        made.append(compare.Outcome("a", "curated", seed, 5, one, 0.5))
        made.append(compare.Outcome("b", "random", seed, 5, other, 0.5))
        made.append(compare.Outcome("c", "everything", seed, 9, other, 0.5))
    return made


def test_arms_are_of_equal_size() -> None:
    """Random has as many rows as curated, without repeats, and another draw for each seed."""
    one = compare.make_arms([1, 2, 3], [1.0] * 3, 50, seed=0)
    two = compare.make_arms([1, 2, 3], [1.0] * 3, 50, seed=1)
    assert [len(arm.rows) for arm in one] == [3, 3, 50]
    assert len(set(one[1].rows)) == 3
    assert one[1].rows != two[1].rows


def test_no_gain_is_printed_as_no_gain() -> None:
    """Differences within twice their error are called no gain, and so is a loss."""
    noisy = compare.verdicts(outcomes([1.0, 1.2, 0.8], [1.1, 0.9, 1.0]))
    worse = compare.verdicts(outcomes([2.0, 2.1, 1.9], [1.0, 1.0, 1.0]))
    better = compare.verdicts(outcomes([0.5, 0.6, 0.55], [1.0, 1.0, 1.0]))
    words = [table["verdict"].to_list() for table in (noisy, worse, better)]
    assert words[0] == ["no gain"] * 4
    assert words[1] == ["no gain (worse)", "no gain"] * 2
    assert words[2] == ["gain", "no gain"] * 2


def test_the_summary_shows_the_spread() -> None:
    """Mean and standard deviation over seeds stand beside each other for every arm."""
    table = compare.summary(outcomes([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]))
    assert table["trained on"].to_list() == list(compare.ARMS)
    assert table["loss"].to_list() == [2.0, 1.0, 1.0]
    assert table["loss ±"].to_list() == [1.0, 0.0, 0.0]


def test_exact_is_what_greedy_decoding_gives() -> None:
    """One forward pass and token-by-token greedy decoding agree on which rows are reproduced."""
    model = looped_gpt.build(**TINY)
    plan = training.Settings(steps=60, batch_rows=4, learning_rate=1e-2, warmup=5)
    training.train(model, rows(4), plan)
    measured = rows(8)
    found = compare.evaluate(model, measured, batch_rows=3)[1]
    assert found == pytest.approx(np.mean([decoded(model, row) for row in measured.tokens]))


def decoded(model: torch.nn.Module, row: np.ndarray) -> bool:  # type: ignore[type-arg]
    text = [int(row[0])]
    while len(text) < len(row):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text == row.tolist()
