"""Every GPU kernel against float64, over many shapes and types.

    python -m tests.benchmarks.kernelcheck [--device cuda] [--json FILE] [--compile | --pass]

On the CPU the kernels run under Triton's interpreter. With --compile they are compiled ahead of
time for GPUs that need not be there, since the interpreter accepts much that the compiler refuses.
With --pass whole passes with the kernels are held against passes in torch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdi.sketch.plan import Hashing, MatrixPlan


@dataclass(frozen=True)
class Shape:
    """B examples of n tokens, an (R, C) matrix, M buckets.

    Attributes:
        zero: whether the last example's left factor is zero.
        strided: whether the factors and the sum are views with strides of their own.
        tile: rows, columns, tokens and group of the tile, where not the default.
    """

    examples: int
    tokens: int
    rows: int
    columns: int
    dim: int
    dtype: str = "float32"
    zero: bool = False
    strided: bool = False
    tile: tuple[int, int, int, int] | None = None


NAMED = (
    Shape(1, 1, 1, 1, 2),
    Shape(1, 1, 64, 64, 128, "bfloat16"),
    Shape(2, 16, 128, 64, 256, "bfloat16"),
    Shape(2, 17, 130, 67, 257, "float16"),
    Shape(3, 33, 65, 129, 64, "bfloat16", zero=True),  # R, C > M
    Shape(2, 5, 300, 40, 100),  # R > M, blocks that no tile divides
    Shape(2, 5, 40, 300, 100, "bfloat16", strided=True),  # C > M
    Shape(2, 40, 70, 50, 31, zero=True, strided=True),  # M below a tile
    Shape(2, 20, 96, 80, 1024, "bfloat16", tile=(32, 32, 16, 1)),  # no groups
    Shape(2, 20, 96, 80, 128, tile=(64, 32, 16, 4)),
    Shape(1, 300, 40, 30, 4096, "bfloat16"),  # columns far apart
)


def drawn(seed: int, count: int, largest: int = 200) -> Iterator[Shape]:
    """Random shapes, the same ones for a seed."""
    draw = random.Random(seed)
    for _ in range(count):
        yield Shape(
            draw.randint(1, 3),
            draw.randint(1, 80),
            draw.randint(1, largest),
            draw.randint(1, largest),
            draw.randint(2, 2 * largest),
            draw.choice(("float32", "bfloat16", "float16")),
            draw.random() < 0.3,
            draw.random() < 0.3,
        )


def factors(shape: Shape, device: str) -> tuple[MatrixPlan, Tensor, Tensor]:
    """The plan and the two factors, (B, n, R) and (B, n, C)."""
    torch.manual_seed(1)
    plan = Hashing(shape.dim, 3, "check").plan("w", (shape.rows, shape.columns), device)
    assert isinstance(plan, MatrixPlan)
    made = []
    for size in (shape.rows, shape.columns):
        one = torch.randn(shape.examples, shape.tokens, size).to(
            device, getattr(torch, shape.dtype)
        )
        made.append(one.transpose(1, 2).contiguous().transpose(1, 2) if shape.strided else one)
    if shape.zero:
        made[0][-1] = 0
    return plan, made[0], made[1]


def reference(plan: MatrixPlan, left: Tensor, right: Tensor) -> Tensor:
    """(B, M) float64, by way of the dense product."""
    signs = plan.row_sign.double()[:, None] * plan.column_sign.double()
    product = (left.double().transpose(1, 2) @ right.double()) * signs
    out = torch.zeros(left.shape[0], plan.dim, dtype=torch.float64, device=left.device)
    return out.index_add_(1, plan.buckets().reshape(-1), product.flatten(1))


def checked(shape: Shape, device: str) -> dict[str, Any]:
    """The worst entry's error of each kernel, as a share of the largest entry of an example.

    The sums do not start at zero: what is taken off again is exact.
    """
    from sdi.sketch.triton_fourier import fused_fourier
    from sdi.sketch.triton_outer import Tile, fused_outer

    plan, left, right = factors(shape, device)
    wanted = reference(plan, left, right)
    tile = None if shape.tile is None else Tile(*shape.tile[:3], group=shape.tile[3])
    wide = torch.zeros(shape.examples, 1 + shape.strided, shape.dim, device=device)
    limit = 16 * (shape.dim + 2) * 50  # small enough for several chunks
    sums, begun = wide[:, 0], wanted.float().round()
    sums += begun
    fused_outer(plan, left, right, sums, limit=limit, tile=tile)
    spectrum = torch.zeros(shape.examples, shape.dim // 2 + 1, dtype=torch.complex64, device=device)
    fused_fourier(plan, left, right, spectrum, limit=limit)
    found = {
        "outer": sums.double() - begun.double(),
        "fourier": torch.fft.irfft(spectrum, n=shape.dim).double(),
    }
    size = wanted.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    if shape.zero:
        size[-1] = 1e-30  # a zero example has exactly zero sums
    errors = {name: float(((value - wanted) / size).abs().max()) for name, value in found.items()}
    others = bool((wide[:, 1:] == 0).all())  # rows between those of a strided sum are left alone
    return {**asdict(shape), **errors, "others untouched": others}


def whole_passes(device: str) -> list[dict[str, Any]]:
    """Sketches of a looped model with the kernels beside those in torch, the same device.

    The trial that decides whether the kernels serve comes first, and must pass.
    """
    import sdi
    from sdi.sketch import tensorsketch
    from sdi.sketch.fused import Fused, attempt
    from sdi.sketch.triton_fourier import fused_fourier
    from sdi.sketch.triton_outer import fused_outer
    from tests.benchmarks.gpumodels import SMALL, LoopedStack

    used: list[str] = []

    def noted(name: str, kernel: Any) -> Any:
        return lambda *given, **more: (used.append(name), kernel(*given, **more))

    attempt(Fused(fused_outer, fused_fourier), torch.device(device))
    kernels = Fused(noted("outer", fused_outer), noted("fourier", fused_fourier))
    torch.manual_seed(0)
    stack = LoopedStack(SMALL[0]).to(device)
    ids = torch.randint(0, SMALL[0].vocabulary, (3, SMALL[0].tokens), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        for method in ("outer", "fourier"):
            values = []
            for serving in (None, kernels):
                tensorsketch.fused = lambda _, serving=serving: serving
                used.clear()
                loop = sdi.Loop(stack.to(dtype), "body")
                sketcher = sdi.Sketcher(loop, dim=64, method=method, rates=_rates(loop))
                values.append(sketcher(batch, ["a", "b", "c"]).values)
            gap = float((values[0] - values[1]).abs().max() / values[0].abs().max())
            lines.append(
                {"dtype": str(dtype), "method": method, "gap": gap, "used": sorted({*used})}
            )
    return lines


def _rates(loop: Any) -> dict[str, float]:
    """Learning rates that differ, so that gradients are scaled."""
    return {name: 1.0 + number % 3 for number, name in enumerate(loop.parameters())}


def compiled(capability: int) -> list[dict[str, Any]]:
    """What the compiler makes of each kernel for a compute capability (80, 90).

    Once as it is launched, and once with sizes and strides of 1, which Triton makes constants.
    """
    from sdi.sketch import triton_fourier, triton_outer

    lines = []
    for kind, tile in (("bf16", triton_outer.HALF), ("fp32", triton_outer.SINGLE)):
        cut = {"ROWS": tile.rows, "COLUMNS": tile.columns, "TOKENS": tile.tokens}
        cut |= {"PRECISION": "ieee", "WIDEN": False}
        pointers = {"left": kind, "right": kind, "row_bucket": "i64", "column_bucket": "i32"}
        pointers |= dict.fromkeys(("row_sign", "column_sign", "out"), "fp32")
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        for group in (1, 8):
            for ones in (("left_row", "right_column"), ("tokens", "rows", "columns", "left_token")):
                given = {**cut, "GROUP": group, **dict.fromkeys(ones, 1)}
                made = _compile(triton_outer._outer, pointers, given, options, capability)
                lines.append({"kernel": f"outer {kind} group {group}", "ones": ones, **made})
    pointers = {"values": "bf16", "source": "i32", "sign": "fp32", "out": "fp32"}
    for ones in ((), ("tokens", "blocks", "values_token")):
        given = triton_fourier.PLACED | dict.fromkeys(ones, 1)
        made = _compile(triton_fourier._place, pointers, given, {}, capability)
        lines.append({"kernel": "place", "ones": ones, **made})
    pointers = {"left": "fp32", "right": "fp32", "out": "fp32"}
    for ones in ((), ("tokens",)):
        given = triton_fourier.MULTIPLIED | dict.fromkeys(ones, 1)
        made = _compile(triton_fourier._multiply, pointers, given, {}, capability)
        lines.append({"kernel": "multiply", "ones": ones, **made})
    return lines


def _compile(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int],
    capability: int,
) -> dict[str, Any]:
    """Shared memory in bytes, and how often the program writes and adds to global memory.

    `narrow` and `wide`: how often a place among bf16 factors is reckoned in 32 and in 64 bits.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = dict.fromkeys(names, "i32")
    types |= {name: f"*{kind}" for name, kind in pointers.items()}
    types |= dict.fromkeys(constants, "constexpr")
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, fixed)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={**options, "enable_fp_fusion": True},
    )
    text = made.asm["ptx"]
    places = re.findall(r"tt\.addptr .*ptr<bf16>>?, (?:tensor<[\dx]+x)?(i32|i64)", made.asm["ttir"])
    return {
        "shared": made.metadata.shared,
        "stores": text.count("st.global"),
        "adds": len(re.findall(r"\b(?:red|atom)\.", text)),
        "products": text.count("mma"),
        "spills": text.count("st.local"),
        "narrow": places.count("i32"),
        "wide": places.count("i64"),
    }


def main() -> None:
    """Check, print the worst errors, and write the lines."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kernelcheck")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", type=int, default=8, help="how many random shapes")
    parser.add_argument("--json", type=Path)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--compile", action="store_true")
    what.add_argument("--pass", action="store_true", dest="whole")
    given = parser.parse_args()
    if given.device == "cpu" and not given.compile:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    if given.whole:
        lines = whole_passes(given.device)
    elif given.compile:
        lines = [{"capability": c, **line} for c in (80, 90) for line in compiled(c)]
    else:
        shapes = (*NAMED, *drawn(given.seed, given.random))
        lines = [checked(shape, given.device) for shape in shapes]
        for name in ("outer", "fourier"):
            sys.stdout.write(f"{name}: worst error {max(line[name] for line in lines):.1e}\n")
    if given.json:
        given.json.write_text(json.dumps(lines))


if __name__ == "__main__":
    main()
