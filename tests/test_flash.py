"""Compiled attention is that of float64 to rounding, however its operands lie and are masked."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from sdi import team
from sdi.flash import TORCHS, Flash, Options, Three, compiled

pytest.importorskip("numba")


@pytest.fixture
def kernels() -> Flash:
    """The compiled ones."""
    found = compiled()
    assert found is not None
    return found


def _operand(shape: tuple[int, int, int, int], lies: str) -> Tensor:
    """(B, H, T, D) in one of the ways that models leave it in."""
    rows, heads, tokens, width = shape
    if lies == "heads first":
        return torch.randn(shape)
    if lies == "tokens first":
        return torch.randn(rows, tokens, heads, width).transpose(1, 2)
    if lies == "one of three":
        return torch.randn(rows, tokens, 3, heads, width)[:, :, 1].transpose(1, 2)
    if lies == "shared by heads":
        return torch.randn(rows, 1, tokens, width).expand(shape)
    return torch.randn(rows, heads, width, tokens).transpose(2, 3)


LIES = ["heads first", "tokens first", "one of three", "shared by heads", "turned"]


def _mask(shape: tuple[int, ...], drawn: random.Random) -> Tensor:
    """Numbers to add, some of them minus infinity, in whole runs at the end or anywhere."""
    mask = 2 * torch.randn(shape)
    if drawn.random() < 0.7:
        hidden = torch.rand(shape) < drawn.choice([0.2, 0.7, 0.95])
        mask = mask.masked_fill(hidden, -math.inf)
    if drawn.random() < 0.3:
        mask = mask.masked_fill(torch.ones(shape[-2:]).triu(1).bool(), -math.inf)
    if drawn.random() < 0.2:
        mask = mask.mT.contiguous().mT
    return mask


def _everything(
    kernels: Flash, operands: Three, delta: Tensor, options: Options
) -> tuple[Tensor, ...]:
    results = kernels.forward(operands, options)
    return *results, *kernels.backward(delta, operands, results, options)


def _wide(operands: Three, delta: Tensor, options: Options) -> tuple[Three, Tensor, Options]:
    """In float64, contiguous."""
    query, key, value, last = (t.double().contiguous() for t in (*operands, delta))
    mask = options.mask if options.mask is None else options.mask.double()
    return (query, key, value), last, options._replace(mask=mask)


def _off(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest error of output, logarithms and gradients, over the largest of each kind."""
    scales = [float(t.abs().max()) for t in expected]
    scales[2:] = [max(scales[2:])] * 3
    pairs = zip(found, expected, scales, strict=True)
    return max(float((a - b).abs().max()) / (s + 1e-3) for a, b, s in pairs)


@pytest.mark.parametrize("seed", range(40))
def test_values_and_gradients(seed: int, kernels: Flash) -> None:
    """Of random shapes, layouts, masks and scales; queries that see nothing have zeros."""
    drawn = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(10):
        rows, heads = drawn.randint(1, 4), drawn.randint(1, 4)
        queries, keys = (drawn.choice([1, 2, 7, 15, 16, 17, 31, 33, 64, 90]) for _ in range(2))
        width = drawn.choice([1, 3, 8, 15, 16, 17, 24, 32, 40, 64, 80])
        keys = queries if drawn.random() < 0.5 else keys
        of_query, of_key = (rows, heads, queries, width), (rows, heads, keys, width)
        operands = tuple(_operand(s, drawn.choice(LIES)) for s in (of_query, of_key, of_key))
        delta = _operand(of_query, drawn.choice(LIES))
        causal, mask = drawn.random() < 0.4, None
        if not causal and drawn.random() < 0.7:
            shapes = [(queries, keys), (rows, 1, queries, keys), (1, keys), (rows, heads, 1, 1)]
            mask = _mask(drawn.choice(shapes), drawn)
        options = Options(mask, causal, drawn.choice([None, 0.3, 1.7]))
        found = _everything(kernels, operands, delta, options)  # type: ignore[arg-type]
        expected = _everything(TORCHS, *_wide(operands, delta, options))  # type: ignore[arg-type]
        assert _off(found, expected) < 2e-5, (of_query, of_key, options)


def test_large_scores(kernels: Flash) -> None:
    """Scores in the hundreds, of either sign, with shares from 0 to 1."""
    torch.manual_seed(0)
    operands = (
        40 * torch.randn(2, 3, 33, 16),
        torch.randn(2, 3, 33, 16),
        torch.randn(2, 3, 33, 16),
    )
    delta, options = torch.randn(2, 3, 33, 16), Options(None, False, 3.0)
    found = _everything(kernels, operands, delta, options)
    expected = _everything(TORCHS, *_wide(operands, delta, options))
    assert float(expected[1].abs().max()) > 300
    assert _off(found, expected) < 1e-3


@pytest.mark.parametrize("where", ["query", "key", "value", "mask", "delta"])
def test_what_is_no_number_stays_so(where: str, kernels: Flash) -> None:
    """A NaN is not lost in maxima, rounding or skipped keys: what depends on it is NaN."""
    torch.manual_seed(0)
    query, key, value, delta = (torch.randn(1, 1, 40, 16) for _ in range(4))
    mask = torch.zeros(40, 40)
    mask[:, 20:] = -math.inf
    at = {"query": query, "key": key, "value": value, "delta": delta}.get(where, mask[None, None])
    at[0, 0, 5, 7] = math.nan
    if where == "mask":
        mask[5, 39] = math.nan
    output, _, *gradients = _everything(
        kernels, (query, key, value), delta, Options(mask, False, None)
    )
    seen = gradients[2] if where == "delta" else output
    assert bool(seen.isnan().any())
    if where in ("query", "mask"):
        assert bool(output[0, 0, 5].isnan().all()) and not bool(output[0, 0, 6].isnan().any())


@pytest.mark.parametrize("width", [12, 16, 20, 24])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_head_is_harmed_by_another(value: float, width: int, kernels: Flash) -> None:
    """What is no number in one head, which shares scratch memory with the next ones."""
    torch.manual_seed(0)
    shape, before = (2, 2, 40, width), torch.get_num_threads()
    query, key, worth, delta = (torch.randn(shape) for _ in range(4))
    delta[0, 0, 5, 3] = query[0, 1, 7, 2] = value
    torch.set_num_threads(1)
    try:
        found = _everything(kernels, (query, key, worth), delta, Options(None, True, None))
    finally:
        torch.set_num_threads(before)
    for tensor in found:
        assert bool(tensor[1].isfinite().all())
    assert not any(bool(gradient[0, 0].isfinite().all()) for gradient in found[2:4])


def test_results_lie_as_torch_lays_them(kernels: Flash) -> None:
    """A model may take a view of the output, or change it in place."""
    for lies in LIES[:4]:
        torch.manual_seed(0)
        operand = _operand((2, 3, 9, 8), lies)
        options = Options(None, False, None)
        ours, torchs = (
            k.forward((operand, operand, operand), options)[0] for k in (kernels, TORCHS)
        )
        assert ours.stride() == torchs.stride() and not ours._is_view(), lies


@pytest.mark.parametrize("which", [0, 1, 2, 3, 4], ids=["query", "key", "value", "delta", "mask"])
def test_numbers_that_do_not_lie_in_memory(which: int, kernels: Flash) -> None:
    """Tensors that torch negates when it reads them, or that are zeros without any memory."""
    torch.manual_seed(0)
    given = [torch.randn(2, 2, 20, 16) for _ in range(4)] + [torch.randn(2, 2, 20, 20)]
    zeros = torch._efficientzerotensor(given[which].shape)
    for odd, plain in ((torch._neg_view(given[which]), -given[which]), (zeros, zeros.clone())):
        found, expected = (
            _everything(kernels, (q, k, v), delta, Options(mask, False, None))
            for q, k, v, delta, mask in (
                [*given[:which], tensor, *given[which + 1 :]] for tensor in (odd, plain)
            )
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("keys", [1, 17, 40])
@pytest.mark.parametrize("width", [5, 16, 33])
def test_scratch_memory_is_enough(
    keys: int, width: int, kernels: Flash, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread uses its own to the last number, and none after it."""
    from sdi.compiled import flash as compiled_flash

    query, key, value = (torch.randn(2, 2, n, width) for n in (9, keys, keys))
    real = team.run

    def run(kernel: Any, job: Any, threads: int) -> None:
        numbers = list(job)
        end = compiled_flash.room(keys, width, backward=kernel is compiled_flash.backward)
        memory = torch.full((end + 64,), 3.0)
        numbers[compiled_flash.SCRATCH] = memory.data_ptr()
        real(kernel, numbers, 1)
        assert bool((memory[end:] == 3).all()) and memory[end - 1] != 3

    monkeypatch.setattr(team, "run", run)
    _everything(kernels, (query, key, value), query, Options(torch.zeros(9, keys), False, None))


def test_too_little_memory_is_an_error(kernels: Flash, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's, which those who look for a batch that fits know; no garbage comes back."""
    from sdi.compiled import flash as compiled_flash

    monkeypatch.setattr(compiled_flash, "room", lambda *_, **__: 1 << 50)
    operand = torch.zeros(1, 1, 8, 8)
    with pytest.raises(RuntimeError, match="allocate memory"):
        kernels.forward((operand, operand, operand), Options(None, False, None))


@pytest.mark.parametrize("runtime", ["torch's", "none"])
def test_any_number_of_threads(
    runtime: str, kernels: Flash, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits on one thread, on several, and where torch has no runtime to share."""
    torch.manual_seed(0)
    operands = (torch.randn(3, 5, 50, 24), torch.randn(3, 5, 50, 24), torch.randn(3, 5, 50, 24))
    delta, options = torch.randn(3, 5, 50, 24), Options(None, True, None)
    found, before = [], torch.get_num_threads()
    if runtime == "none":
        monkeypatch.setattr(team, "_parallel", lambda: None)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert team.size() == (1 if runtime == "none" else threads)
            found.append(_everything(kernels, operands, delta, options))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_operands_of_another_type_are_our_own_mistake(kernels: Flash) -> None:
    """Kernels read float32 by address; anything else would be read as garbage."""
    operand: Any = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="float64"):
        kernels.forward((operand, operand, operand), Options(None, False, None))


def test_values_of_another_number_than_keys_are_our_own_mistake(kernels: Flash) -> None:
    """Their gradient would be written beyond its end."""
    query, key, value = (torch.zeros(1, 1, n, 4) for n in (10, 20, 5))
    with pytest.raises(AssertionError, match=r"20.*5"):
        kernels.forward((query, key, value), Options(None, False, None))


def test_nowhere_to_keep_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no folder can be written to, kernels are compiled anew and run all the same."""
    import numba
    import numpy as np

    from sdi.compiled import turns

    real, asked = numba.cfunc, []

    def cfunc(*arguments: Any, **options: Any) -> Any:
        asked.append(options.pop("cache", False))
        if asked[-1]:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*arguments, **options)

    monkeypatch.setattr(numba, "cfunc", cfunc)

    def count(address: Any) -> None:
        job = turns.carray(address, (2,))
        while turns.turn(address, turns.TURNS) < 5:
            job[1] += 1

    kernel = turns.kernel(count)
    assert asked == [True, False]
    numbers = np.zeros(2, dtype=np.int64)
    monkeypatch.setattr(team.np, "array", lambda *_, **__: numbers)
    team.run(kernel, (0, 0), 1)
    assert numbers.tolist() == [6, 5]
