"""The product δᵀa in bfloat16, the shifted adds after it, and the choice by measured costs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sdi
from sdi.errors import SelfCheckError, SpecError
from sdi.sketch import costs, kernels, tensorsketch
from sdi.sketch.plan import Hashing, MatrixPlan
from tests.looped import LoopedModel, names, tokens

CPU = torch.device("cpu")


def plan_of(rows: int, columns: int, dim: int) -> MatrixPlan:
    """The hashes of one matrix."""
    plan = Hashing(dim, 0, "").plan("weight", (rows, columns))
    assert isinstance(plan, MatrixPlan)
    return plan


def outer(plan: MatrixPlan, left: Tensor, right: Tensor, *, half: bool) -> Tensor:
    """The sketch by way of the dense product."""
    out = torch.zeros(left.shape[0], plan.dim)
    tensorsketch.add_outer(plan, left, right, out, 1 << 16, half=half)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "dim"), [(7, 64), (64, 64), (61, 64)])
def test_shifted_add(rows: int, dim: int, dtype: torch.dtype) -> None:
    """The compiled kernel and `index_add_` put the same entries into the same buckets."""
    torch.manual_seed(rows)
    product = torch.randn(3, 20, rows).to(dtype)
    starts = torch.randint(0, dim, (20,))
    row_sign, column_sign = torch.randn(rows).sign(), torch.randn(20).sign()
    found, expected = torch.zeros(3, dim), torch.zeros(3, dim, dtype=torch.float64)
    kernels.shifted_add(product, starts, row_sign, column_sign, found)
    for c in range(20):
        for r in range(rows):
            entry = product[:, c, r].double() * row_sign[r] * column_sign[c]
            expected[:, (int(starts[c]) + r) % dim] += entry
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("odd", ["kind", "shape", "rows"])
def test_shifted_add_of_what_it_cannot_read(odd: str) -> None:
    """The kernel reads by address: another type or shape would be garbage."""
    product = torch.ones(3, 4, 8, dtype=torch.float16 if odd == "kind" else torch.float32)
    starts = torch.zeros(5 if odd == "shape" else 4, dtype=torch.int64)
    out = torch.zeros(3, 7 if odd == "rows" else 16)
    with pytest.raises(AssertionError):
        kernels.shifted_add(product, starts, torch.ones(8), torch.ones(4), out)
    found = torch.zeros(3, 16)
    product = torch._neg_view(torch.ones(3, 4, 8))
    kernels.shifted_add(product, starts[:4], torch.ones(8), torch.ones(4), found)
    assert found[:, :8].eq(-4).all() and found[:, 8:].eq(0).all()


def test_shifted_add_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where numba is missing the sums are the same."""
    torch.manual_seed(0)
    plan, left, right = plan_of(90, 30, 64), torch.randn(2, 5, 90), torch.randn(2, 5, 30)
    there = [outer(plan, left, right, half=half) for half in (False, True)]
    monkeypatch.setattr(kernels, "_compiled_add", lambda: None)
    missing = [outer(plan, left, right, half=half) for half in (False, True)]
    torch.testing.assert_close(there, missing, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kinds", ["whole", "half", "mixed", "float16", "float64"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 16, 16), (3, 33, 300), (2, 300, 130)])
@pytest.mark.parametrize("compiled", [True, False])
def test_halves(
    compiled: bool, shape: tuple[int, int, int], kinds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factors of a product in bfloat16 are what torch rounds them to, and so is the noise."""
    if compiled:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(kernels.team, "kernels", lambda _: None)
    types = {"whole": torch.float32, "half": torch.bfloat16, "mixed": torch.bfloat16}
    left_type = types.get(kinds) or getattr(torch, kinds)
    right_type = torch.float32 if kinds == "mixed" else left_type
    torch.manual_seed(0)
    left = torch.randn(*shape).to(left_type)
    wide = torch.randn(shape[0], shape[1], shape[2] + 5).to(right_type)
    for right in (wide[..., :-5], wide.mT.contiguous().mT, torch._neg_view(wide)):
        noise = torch.ones(shape[0])
        narrow, turned, sums = kernels.halves(left, right, noise)
        assert narrow.dtype == turned.dtype == torch.bfloat16
        assert torch.equal(narrow, left.bfloat16())
        assert torch.equal(turned, right.bfloat16().mT)
        lengths = left.double().square().sum(2) * right.double().square().sum(2)
        torch.testing.assert_close(noise.double(), 1 + lengths.sum(1), rtol=5e-3, atol=0)
        *plain, _ = kernels.halves(left, right, None)
        assert all(map(torch.equal, plain, (narrow, turned)))
        assert (sums is not None) is compiled
        if sums is not None:
            torch.testing.assert_close(sums.double(), left.double().sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_chunks_of_examples(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many examples a product holds, each has its own buckets, noise and sums."""
    pytest.importorskip("numba")
    torch.manual_seed(0)
    plan, left, right = plan_of(90, 30, 64), torch.randn(5, 7, 90), torch.randn(5, 7, 30)
    out, noise = torch.zeros(5, 64), torch.zeros(5)
    monkeypatch.setattr(tensorsketch.team, "size", lambda: 1)
    monkeypatch.setattr(tensorsketch, "PRODUCT", count * 2 * 90 * 30)
    asked: list[int] = []
    real = tensorsketch.add_dense_columns

    def counted(plan: MatrixPlan, product: Tensor, buckets: Tensor) -> None:
        asked.append(len(product))
        real(plan, product, buckets)

    monkeypatch.setattr(tensorsketch, "add_dense_columns", counted)
    sums = tensorsketch.add_outer(plan, left, right, out, 1 << 20, half=True, noise=noise)
    assert asked == {1: [1] * 5, 2: [2, 2, 1], 5: [5]}[count]
    assert sums is not None
    torch.testing.assert_close(sums, left.sum(1), rtol=1e-5, atol=1e-5)
    lengths = left.square().sum(2) * right.square().sum(2)
    torch.testing.assert_close(noise, lengths.sum(1), rtol=5e-3, atol=0)
    torch.testing.assert_close(out, outer(plan, left, right, half=True), rtol=1e-5, atol=1e-4)


def test_a_bias_is_scaled_by_its_own_rate() -> None:
    """Its gradient comes with the product of the weight, which has another learning rate."""
    loop = sdi.Loop(LoopedModel(nn.Linear(16, 16)), "body")
    for rates in ({"weight": 4.0, "bias": 1.0}, {"weight": 1.0, "bias": 9.0}):
        given = {f"body.{name}": rate for name, rate in rates.items()}
        plain, rounded = (
            sdi.Sketcher(loop, dim=256, products=products, method="outer", rates=given)
            for products in ("float32", "bfloat16")
        )
        exact = plain(tokens(), names(4)).values
        gap = rounded(tokens(), names(4)).values - exact
        assert float((gap.norm(dim=2) / exact.norm(dim=2)).max()) < 1e-2


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_halves_whatever_the_default_type(default: torch.dtype) -> None:
    """A kernel writes float32 by address; what torch makes by default may be shorter."""
    torch.manual_seed(0)
    left, right, noise = torch.randn(2, 300, 130), torch.randn(2, 300, 90), torch.zeros(2)
    expected = kernels.halves(left, right, noise)
    again = noise.clone().zero_()
    torch.set_default_dtype(default)
    try:
        found = kernels.halves(left, right, again)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(noise, again)
    assert (found[2] is None) is (expected[2] is None)
    if found[2] is not None and expected[2] is not None:
        assert found[2].dtype == torch.float32 and torch.equal(found[2], expected[2])


def test_every_float32_is_rounded_as_by_torch() -> None:
    """Of any bits: zeros with signs, subnormal and infinite numbers, ties; NaN stays NaN."""
    pytest.importorskip("numba")
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2, 64, 192), dtype=torch.int64)
    bits[0, :, ::3] &= 0xFFFF8000 - 2**32  # ties
    special = torch.tensor([0, 1, 1 << 15, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF])
    bits[1, :, :7], bits[1, :, 7:14] = special, special - 2**31
    numbers = bits.to(torch.int32).view(torch.float32)[:, :61, :187]  # squares, and what is left
    narrow, turned, _ = kernels.halves(numbers, numbers, None)
    expected = numbers.bfloat16()
    for found in (narrow, turned.mT):
        nan = expected.isnan()
        assert torch.equal(found.isnan(), nan)
        assert torch.equal(found[~nan].view(torch.int16), expected[~nan].view(torch.int16))


def test_rounding_is_small_beside_the_sketch() -> None:
    """Rounded products move a sketch by 0.3 % of its norm, and estimates far less than 1/√M."""
    torch.manual_seed(0)
    gap, own, added = [], [], []
    for seed in range(24):
        plan = Hashing(1024, seed, "").plan("weight", (160, 128))
        assert isinstance(plan, MatrixPlan)
        left, right = torch.randn(2, 32, 160), torch.randn(2, 32, 128)
        right[1], left[1] = right[0] + right[1], left[0] + left[1]  # two rows alike
        exact = left.transpose(1, 2) @ right
        plain, rounded = (outer(plan, left, right, half=half) for half in (False, True))
        scale = float(exact[0].norm() * exact[1].norm())
        truth = float((exact[0] * exact[1]).sum())
        gap.append(float((plain - rounded).norm() / plain.norm()))
        own.append((float(plain[0] @ plain[1]) - truth) / scale)
        added.append(float(rounded[0] @ rounded[1] - plain[0] @ plain[1]) / scale)
    assert 1e-3 < max(gap) < 5e-3
    root_mean_square = [torch.tensor(errors).square().mean().sqrt() for errors in (own, added)]
    assert root_mean_square[1] < 0.1 * root_mean_square[0]


@pytest.mark.parametrize(
    ("products", "shape", "dim", "expected"),
    [
        ("auto", (128, 128), 4096, True),
        ("auto", (128, 64), 4096, False),
        ("auto", (128, 128), 1 << 15, False),
        ("float32", (512, 512), 4096, False),
        ("bfloat16", (4, 4), 64, True),
    ],
)
def test_what_is_rounded(
    products: tensorsketch.Products,
    shape: tuple[int, int],
    dim: int,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By itself it rounds large matrices whose sketch is coarser than that, where it pays."""
    monkeypatch.setattr(tensorsketch, "multiplies_bfloat16", lambda _: True)
    left, right = torch.zeros(1, 1, shape[0]), torch.zeros(1, 1, shape[1])
    assert tensorsketch.rounds(products, plan_of(*shape, dim), left, right) is expected
    monkeypatch.setattr(tensorsketch, "multiplies_bfloat16", lambda _: False)
    unless_told = products == "bfloat16"
    assert tensorsketch.rounds(products, plan_of(*shape, dim), left, right) is unless_told


def test_sketcher_takes_products() -> None:
    """A sketcher rounds where told to, says so, passes its self-check; others are refused."""
    loop = sdi.Loop(LoopedModel(nn.Linear(16, 16)), "body")
    plain = sdi.Sketcher(loop, dim=64, products="float32")
    rounded = sdi.Sketcher(loop, dim=64, products="bfloat16", method="outer")
    before, after = plain(tokens(), names(4)).values, rounded(tokens(), names(4)).values
    assert not plain.rounded
    assert rounded.rounded
    assert 1e-4 < float((before - after).norm() / before.norm()) < 1e-2
    report = sdi.self_check(rounded, tokens(), names(4))
    assert report.worst < 1e-4
    assert report.sketch is not None
    assert report.sketch < 1e-4  # held against the sketch without rounding
    with pytest.raises(SpecError, match="unknown products 'int8'"):
        sdi.Sketcher(loop, dim=64, products="int8")  # type: ignore[arg-type]


class Keys(nn.Module):
    """Attention whose keys alone are attributed; what they have in common cancels."""

    def __init__(self, common: float) -> None:
        super().__init__()
        self.key, self.common = nn.Linear(128, 128, bias=False), common

    def forward(self, x: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(x, (128,))
        scores = x @ self.key(normed + self.common).transpose(1, 2) / 128**0.5
        return x + scores.softmax(dim=-1) @ x


@pytest.mark.parametrize(("common", "repeated"), [(0.0, 0), (30.0, 4)])
def test_rows_that_cancel_are_not_rounded(
    common: float, repeated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that is a small difference of large tokens is sketched again in float32."""
    monkeypatch.setattr(tensorsketch, "multiplies_bfloat16", lambda _: True)
    torch.manual_seed(0)
    loop = sdi.Loop(LoopedModel(Keys(common), width=128), "body")
    batch, ids = tokens(), names(4)
    sketcher = sdi.Sketcher(loop, dim=4096, method="outer")
    found = sketcher(batch, ids).values
    exact = sdi.Sketcher(loop, dim=4096, products="float32")(batch, ids).values
    gap = (found - exact).norm(dim=2) / exact.norm(dim=2)
    assert sketcher.repeated == repeated
    assert float(gap.max()) < (1e-5 if repeated else 1 / (2 * 4096**0.5))
    assert (float(gap.max()) > 1e-4) is not bool(repeated)
    assert sdi.self_check(sketcher, batch, ids).worst < 1e-3
    rough = sdi.Sketcher(loop, dim=4096, method="outer", products="bfloat16")
    if repeated:
        with pytest.raises(SelfCheckError, match="products in bfloat16 move a sketch by"):
            sdi.self_check(rough, batch, ids)


@pytest.mark.parametrize("dim", [64, 256, 1024])
def test_rough_sketches_pass_their_check(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However coarse the sketch, what is left rounded stays within what the self-check allows."""
    monkeypatch.setattr(tensorsketch, "multiplies_bfloat16", lambda _: True)
    torch.manual_seed(0)
    loop = sdi.Loop(LoopedModel(Keys(3.0), width=128), "body")
    sketcher = sdi.Sketcher(loop, dim=dim, method="outer")
    report = sdi.self_check(sketcher, tokens(), names(4))
    assert sketcher.rounded
    assert report.sketch is not None
    assert report.sketch < 1e-4


def test_dropout_is_named_where_products_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes two passes differ is said to be that, and not the rounding."""
    monkeypatch.setattr(tensorsketch, "multiplies_bfloat16", lambda _: True)
    body = nn.Sequential(nn.Linear(128, 128), nn.Dropout(0.5))
    sketcher = sdi.Sketcher(sdi.Loop(LoopedModel(body, width=128), "body"), dim=1024)
    with pytest.raises(SelfCheckError, match="dropout left on"):
        sdi.self_check(sketcher, tokens(), names(4))


def test_repeated_rows_draw_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pass over a batch draws the random numbers of the first, and no others after."""
    monkeypatch.setattr(tensorsketch, "multiplies_bfloat16", lambda _: True)
    torch.manual_seed(0)
    model = LoopedModel(nn.Sequential(Keys(30.0), nn.Dropout(0.1)), width=128)
    loop = sdi.Loop(model, "body")
    repeating = sdi.Sketcher(loop, dim=4096, method="outer")
    plain = sdi.Sketcher(loop, dim=4096, products="float32")
    parts, after = [], []
    for sketcher in (repeating, plain):
        torch.manual_seed(7)
        parts.append(sketcher(tokens(), names(4)))
        after.append(torch.rand(1))
    assert repeating.repeated == 4
    torch.testing.assert_close(parts[0].losses, parts[1].losses)
    torch.testing.assert_close(parts[0].values, parts[1].values, rtol=1e-4, atol=1e-7)
    assert torch.equal(*after)


def test_float64_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in double precision asked for more than bfloat16 can give."""
    monkeypatch.setattr(tensorsketch, "multiplies_bfloat16", lambda _: True)
    left, right = (torch.zeros(1, 1, 128, dtype=torch.float64) for _ in range(2))
    assert not tensorsketch.rounds("auto", plan_of(128, 128, 4096), left, right)


def test_costs_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are kept in a file, read from there, and measured again where it is no good."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[torch.device] = []
    given = costs.Costs(1.0, 0.5, 0.2, 2.0, 3.0, 1.0, float("inf"), 1.0, float("inf"))

    def measure(device: torch.device) -> costs.Costs:
        asked.append(device)
        return given

    monkeypatch.setattr(costs, "measure", measure)
    path = tmp_path / "sdi" / "costs.json"
    for expected in (1, 1):
        costs.costs.cache_clear()
        assert costs.costs(CPU) == given
        assert len(asked) == expected
    for damaged in ("{", "[]", json.dumps({key: {} for key in json.loads(path.read_text())})):
        path.write_text(damaged)
        costs.costs.cache_clear()
        assert costs.costs(CPU) == given
        assert asdict(given) in json.loads(path.read_text()).values()
    assert len(asked) == 4
    path.unlink()
    monkeypatch.setattr(costs, "compiled", lambda: None)  # failed, where the adds did not
    monkeypatch.setattr(costs, "has_numba", lambda: True)
    costs.costs.cache_clear()
    assert costs.costs(CPU) == given and not path.exists()
    costs.costs.cache_clear()


def test_costs_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home directory measures, rather than fails."""

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert costs._home().name == "sdi"


def test_costs_of_this_machine() -> None:
    """Every constant that is measured is a positive time."""
    assert min(asdict(costs.measure(CPU)).values()) > 0


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "dim", "expected"),
    [(128, 64, 64, 4096, "outer"), (1, 4096, 4096, 1024, "fourier")],
)
def test_the_cheaper_is_chosen(
    tokens: int, rows: int, columns: int, dim: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token of a wide layer goes through the transforms, a long row of a narrow one not."""
    others = dict.fromkeys(["linear", "onednn_linear", "attention", "compiled_attention"], 1.0)
    others |= {"half_product": 0.005, "tiled_product": 0.002, "add": 0.1, "transform": 0.1}
    monkeypatch.setattr(tensorsketch, "costs", lambda _: costs.Costs(0.01, **others))
    left, right = torch.zeros(1, tokens, rows), torch.zeros(1, tokens, columns)
    assert tensorsketch.choose(plan_of(rows, columns, dim), left, right) == expected
