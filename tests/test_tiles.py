"""Sketches of δᵀa in tile registers: what they are of rounded factors, and where they are made."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sdi import amx, team
from sdi.sketch import costs, tensorsketch, tiles
from sdi.sketch.plan import Hashing, MatrixPlan

HALF = torch.bfloat16
KINDS = [torch.float32, HALF]
SHAPES = [
    (1, 1, 16, 16, 64),  # one of everything
    (2, 5, 32, 48, 96),
    (3, 33, 48, 16, 48),  # as many buckets as rows: every column wraps
    (5, 64, 64, 32, 4096),
    (2, 256, 112, 80, 1024),
    (3, 700, 96, 112, 256),  # stretches of tokens, the last a part
]


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found out of the processor is asked again, before and after."""
    amx.kernels.cache_clear()
    team.features.cache_clear()
    yield
    amx.kernels.cache_clear()
    team.features.cache_clear()


@pytest.fixture
def kernels() -> ModuleType:
    found = amx.kernels("tiles")
    if found is None:
        pytest.skip("this processor has no tiles of bfloat16, or numba is not installed")
    return found


def plan_of(rows: int, columns: int, dim: int) -> MatrixPlan:
    made = Hashing(dim, 0, "tiles").plan("weight", (rows, columns))
    assert isinstance(made, MatrixPlan)
    return made


def exactly(plan: MatrixPlan, left: Tensor, right: Tensor) -> Tensor:
    """The sketch of Σ_n left ⊗ right in float64, entry by entry."""
    product = left.double().mT @ right.double()
    signs = plan.row_sign[:, None] * plan.column_sign
    out = torch.zeros(len(left), plan.dim, dtype=torch.float64)
    return out.index_add_(1, plan.buckets().flatten(), (product * signs).flatten(1))


def factors(*shape: int, left: torch.dtype, right: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, tokens, rows, columns = shape
    torch.manual_seed(0)
    one, other = torch.randn(batch, tokens, rows), torch.randn(batch, tokens, columns)
    return one.to(left), other.to(right)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("right", KINDS, ids=str)
@pytest.mark.parametrize("left", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_sketch_rounded_factors(
    shape: tuple[int, ...],
    left: torch.dtype,
    right: torch.dtype,
    threads: int,
    kernels: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Factors are rounded to bfloat16 and nothing else is; what is there already is added to; sums
    over tokens and what rounding may be off by come by the way, whoever does which part.
    """
    monkeypatch.setattr(tiles.team, "FEW", 0)
    monkeypatch.setattr(tiles, "BLOCK", 1 << 14)  # several blocks of rows
    batch, _, rows, columns, dim = shape
    plan = plan_of(rows, columns, dim)
    one, other = factors(*shape[:4], left=left, right=right)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    out, noise = torch.ones(batch, dim), torch.ones(batch)
    try:
        sums = tiles.add(kernels, plan, one, other, out, None if left == right == HALF else noise)
    finally:
        torch.set_num_threads(before)
    expected = exactly(plan, one.to(HALF), other.to(HALF))
    torch.testing.assert_close(
        out.double() - 1, expected, rtol=0, atol=2e-6 * expected.max().item()
    )
    if left == right == HALF:
        assert sums is None
        return
    assert sums is not None
    torch.testing.assert_close(sums.double(), one.double().sum(dim=1), rtol=0, atol=1e-4)
    lengths = one.double().square().sum(dim=2) * other.double().square().sum(dim=2)
    torch.testing.assert_close(noise.double() - 1, lengths.sum(dim=1), rtol=2e-3, atol=0)


def test_factors_that_lie_apart(kernels: ModuleType) -> None:
    """Examples and tokens may lie anywhere, one example for all of them; columns side by side."""
    plan = plan_of(32, 48, 128)
    one, other = factors(4, 40, 64, 96, left=torch.float32, right=torch.float32)
    for left, right in [
        (one[:, ::2, 16:48], other[:, 1::2, :48]),
        (one[:1, :20, :32].expand(4, -1, -1), other[:, :20, 48:]),
        (one[:, :32, :20].mT, other[:, :32, :48].contiguous()),
    ]:
        left, right = left[..., :32], right[:, : left.shape[1]]
        out = torch.zeros(4, 128)
        tiles.add(kernels, plan, left, right, out, None)
        expected = exactly(plan, left.to(HALF), right.to(HALF))
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(bad: float, kernels: ModuleType) -> None:
    """A factor that is not finite spoils the buckets of its own entries, of its own row only."""
    plan = plan_of(32, 32, 64)
    one, other = factors(3, 40, 32, 32, left=torch.float32, right=torch.float32)
    one[1, 3, 5] = bad
    out, noise = torch.zeros(3, 64), torch.zeros(3)
    tiles.add(kernels, plan, one, other, out, noise)
    spoiled = torch.zeros(3, 64, dtype=torch.bool)
    spoiled[1, plan.buckets()[5]] = True
    assert torch.equal(~out.isfinite(), spoiled)
    assert noise[[0, 2]].isfinite().all() and not noise[1].isfinite()


def test_rounding_is_that_of_torch(kernels: ModuleType) -> None:
    """One token, one column at a time: an entry is the rounded factor itself, ties to even."""
    plan = plan_of(16, 16, 256)
    numbers = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 - 2**-9, -(1 + 2**-8), 3e38, 1e-30])
    left = torch.zeros(1, 1, 16)
    left[0, 0, : len(numbers)] = numbers
    right = torch.zeros(1, 1, 16)
    right[0, 0, 3] = 1
    out = torch.zeros(1, 256)
    tiles.add(kernels, plan, left, right, out, None)
    bucket = plan.buckets()[:, 3]
    found = out[0, bucket] * plan.row_sign * plan.column_sign[3]
    assert torch.equal(found, left[0, 0].to(HALF).float())


@pytest.mark.parametrize(
    ("rows", "columns", "dim", "kind", "expected"),
    [
        (32, 48, 64, torch.float32, True),
        (40, 48, 64, torch.float32, False),
        (32, 40, 64, torch.float32, False),
        (128, 32, 64, torch.float32, False),
        (32, 48, 64, torch.float64, False),
        (32, 48, 64, torch.float16, False),
    ],
)
def test_other_factors_go_the_other_way(
    rows: int,
    columns: int,
    dim: int,
    kind: torch.dtype,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sides of other than whole tiles, more rows than buckets and other types are not for tiles,
    and have the same sketch.
    """
    plan = plan_of(rows, columns, dim)
    one, other = factors(2, 7, rows, columns, left=kind, right=kind)
    monkeypatch.setattr(amx, "kernels", lambda name: name)
    assert (tiles.kernels_for(plan, one, other) == "tiles") is expected
    assert tiles.kernels_for(plan, one[:, :0], other[:, :0]) is None
    assert tiles.kernels_for(plan, one, other[..., :0]) is None
    monkeypatch.undo()
    out = torch.zeros(2, dim)
    tensorsketch.add_outer(plan, one, other, out, 1 << 24, half=True, noise=torch.zeros(2))
    exact = exactly(plan, one.to(HALF), other.to(HALF))
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2**-8 * exact.abs().max().item())


@pytest.mark.parametrize(
    ("known", "granted", "told"),
    [
        ({}, True, None),
        (dict.fromkeys(amx._TILES, True), False, None),
        (dict.fromkeys(amx._TILES, True), True, ""),  # NUMBA_CPU_NAME=generic
        (dict.fromkeys(amx._TILES, True), True, "+avx512f,+amx-tile,+amx-int8"),
    ],
)
def test_without_tiles_nothing_is_asked_of_them(
    known: dict[str, bool],
    granted: bool,
    told: str | None,
    forgotten: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where torch knows of no tiles, the system does not let us use them, or numba compiles for
    another processor, for which LLVM would end the process, there is no kernel.
    """
    config = pytest.importorskip("numba").core.config
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: granted)
    monkeypatch.setattr(config, "CPU_FEATURES", told)
    assert amx.kernels("tiles") is None


def test_numba_that_is_told_to_leave_avx_alone(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiles for none, whatever the processor has."""
    config = pytest.importorskip("numba").core.config
    if config.CPU_FEATURES is not None:
        pytest.skip("it was told what to compile for")
    before = team.features()
    team.features.cache_clear()
    monkeypatch.setattr(config, "ENABLE_AVX", 0)
    assert team.features() == {each for each in before if not each.startswith("avx")}


def test_a_broken_compiler_is_no_error(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where numba is there and cannot be loaded, torch serves."""
    monkeypatch.setitem(sys.modules, "numba.core", None)
    assert not team.features()


@pytest.mark.parametrize("limit", [1, 1 << 30])
def test_a_half_factor_is_widened_a_few_examples_at_a_time(
    limit: int, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one of float32 it is widened, no more of it at once than buffers may take."""
    plan = plan_of(32, 48, 128)
    one, other = factors(5, 40, 32, 48, left=HALF, right=torch.float32)
    taken: list[int] = []
    add = tiles.add

    def noted(kernels: ModuleType, plan: MatrixPlan, left: Tensor, *others: Tensor) -> Tensor:
        taken.append(len(left))
        found = add(kernels, plan, left, *others)
        assert found is not None
        return found

    monkeypatch.setattr(tiles, "add", noted)
    out, noise = torch.zeros(5, 128), torch.zeros(5)
    sums = tensorsketch.add_outer(plan, one, other, out, limit, half=True, noise=noise)
    assert taken == ([5] if limit > 1 else [1] * 5)
    assert sums is not None and sums.shape == (5, 32)
    expected = exactly(plan, one, other.to(HALF))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)


def test_default_devices_do_not_reach_the_kernel(kernels: ModuleType) -> None:
    """Room that compiled code writes to is on the CPU, whatever torch's default device is."""
    plan = plan_of(32, 32, 64)
    one, other = factors(2, 10, 32, 32, left=torch.float32, right=torch.float32)
    out = torch.zeros(2, 64)
    tiles.team._kept.__dict__.clear()
    with torch.device("meta"):
        tiles.add(kernels, plan, one, other, out, None)
    expected = exactly(plan, one.to(HALF), other.to(HALF))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)


def test_products_in_tiles_have_a_cost_of_their_own() -> None:
    """It counts the adds; what does not fit into tiles costs what it does elsewhere."""
    others = dict.fromkeys(["linear", "onednn_linear", "attention", "compiled_attention"], 1.0)
    others |= {"half_product": 0.5, "tiled_product": 0.25, "add": 2.0, "transform": 1.0}
    known = costs.Costs(1.0, **others)
    assert known.outer(8, 2, 3, half=True, tiled=True) == 8 * 2 * 3 * 0.25
    assert known.outer(8, 2, 3, half=True, tiled=False) == 2 * 3 * (8 * 0.5 + 2)
    assert known.outer(8, 2, 3, half=False, tiled=False) == 2 * 3 * (8 + 2)
