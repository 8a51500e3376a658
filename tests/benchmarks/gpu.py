"""Everything that a short while on a GPU can tell: are the kernels right, and how fast is it all?

    python -m tests.benchmarks.gpu [--section NAME ...] [--json FILE] [--small]

Needs torch, numpy and triton beside this checkout, and a few minutes. One table is printed last.
A section, or a line of one, that fails says so and the others go on. With --small everything runs
in seconds on tiny sizes, without a GPU under Triton's interpreter, where times mean nothing.

- rate: the card's own bf16 product and copy, which shares are measured against.
- check: every kernel against float64, `tests.benchmarks.kernelcheck`; the worst error.
- kernels: sketching one layer's gradients, as a ratio to the plain product δᵀa of the same factors.
- passes: a whole pass beside a training step and the floor, with peak memory.
- after: scores, CountSketch and int8 quantisation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import sdi
from sdi.sketch.countsketch import add_dense
from sdi.sketch.plan import Hashing
from sdi.sketch.quantize import dequantize, quantize
from tests.benchmarks import gpumodels, kernelcheck
from tests.benchmarks.clock import Timed, Work, described, interleaved
from tests.benchmarks.kernelcheck import Shape

Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a section needs to know: where, how large, how long, and the card's rates so far."""

    device: str
    small: bool
    rates: dict[str, float]

    @property
    def seconds(self) -> float:
        """Spent on each comparison."""
        return 0.0 if self.small else 4.0


REAL = (
    Shape(40, 128, 768, 768, 8192, "bfloat16"),
    Shape(40, 128, 2304, 768, 8192, "bfloat16"),
    Shape(40, 128, 3072, 768, 8192, "bfloat16"),
    Shape(40, 128, 768, 3072, 8192, "bfloat16"),
    Shape(40, 128, 768, 3072, 4096, "bfloat16"),
    Shape(8, 1024, 2048, 2048, 8192, "bfloat16"),
    Shape(8, 1024, 8192, 2048, 8192, "bfloat16"),
    Shape(64, 16, 4096, 4096, 4096, "bfloat16"),
    Shape(40, 128, 768, 3072, 8192, "float32"),
)
TINY = (Shape(2, 20, 40, 24, 128, "bfloat16"),)
# rows, columns and tokens of a tile, warps, stages, most columns of a group
TILES = (
    (128, 64, 32, 4, 3, 64),
    (128, 64, 32, 4, 3, 1),
    (128, 64, 64, 4, 3, 64),
    (128, 128, 32, 8, 3, 64),
    (128, 128, 32, 8, 3, 1),
    (256, 64, 32, 8, 3, 64),
    (64, 64, 32, 4, 4, 64),
    (64, 64, 16, 4, 3, 64),
)


def rate(run: Run) -> Iterator[Line]:
    """The bf16 product of two square matrices, and a copy."""
    size = 64 if run.small else 8192
    a = torch.randn(size, size, device=run.device).bfloat16()
    b, target = a.clone(), torch.empty(4 * a.numel(), device=run.device)
    source = torch.ones_like(target)
    found = interleaved(
        {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, run.device, run.seconds
    )
    run.rates["product"] = 2 * size**3 / found["product"].median
    run.rates["copy"] = 8 * target.numel() / found["copy"].median
    yield line("rate", f"bf16 {size}^3", "product", found["product"], rate=run.rates["product"])
    yield line("rate", f"{target.numel()} floats", "copy", found["copy"], rate=run.rates["copy"])


def check(run: Run) -> Iterator[Line]:
    """The worst error of each kernel by type, over named, random and real shapes."""
    shapes = [*kernelcheck.NAMED[:5]]
    if not run.small:
        shapes = [*kernelcheck.NAMED, *kernelcheck.drawn(0, 40), *kernelcheck.drawn(1, 20, 2000)]
        shapes += REAL
    worst: dict[tuple[str, str], tuple[float, Shape]] = {}
    for shape in shapes:
        found = kernelcheck.checked(shape, run.device)
        for kernel in ("outer", "fourier"):
            at = (shape.dtype, kernel)
            worst[at] = max(
                worst.get(at, (-1.0, shape)), (found[kernel], shape), key=lambda x: x[0]
            )
        if not found["others untouched"]:
            yield {"section": "check", "case": str(asdict(shape)), "error": "wrote elsewhere"}
    for (dtype, kernel), (error, shape) in worst.items():
        yield {
            "section": "check",
            "case": f"{dtype}, {len(shapes)} shapes",
            "what": kernel,
            "worst error": error,
            "worst shape": asdict(shape),
        }


def kernels(run: Run) -> Iterator[Line]:
    """Each way to the sketch of one layer, beside the plain product."""
    for shape in TINY if run.small else REAL:
        repeat = 1 if run.small else 20
        found = interleaved(_ways(shape, run), run.device, run.seconds, repeat=repeat)
        base = found["product"].median
        products = 2 * shape.examples * shape.tokens * shape.rows * shape.columns
        case = f"{shape.examples}x{shape.tokens} {shape.rows}x{shape.columns} m={shape.dim}"
        for name, timed in found.items():
            more = {} if timed.error else {"share": _share(run, products / timed.median)}
            yield line("kernels", f"{case} {shape.dtype}", name, timed, base, **more)


def _ways(shape: Shape, run: Run) -> dict[str, Work]:
    from sdi.sketch.triton_fourier import fused_fourier
    from sdi.sketch.triton_outer import Tile, fused_outer

    plan, left, right = kernelcheck.factors(shape, run.device)
    out = torch.zeros(shape.examples, shape.dim, device=run.device)
    spectrum = torch.zeros(
        shape.examples, shape.dim // 2 + 1, dtype=torch.complex64, device=run.device
    )

    def dense() -> None:
        product = right.transpose(1, 2) @ left  # rows contiguous, as the buckets are
        add_dense(plan, product.float().transpose(1, 2), out)

    ways: dict[str, Work] = {
        "product": lambda: left.transpose(1, 2) @ right,
        "product, then scatter": dense,
        "fourier": lambda: fused_fourier(plan, left, right, spectrum),
        "outer": lambda: fused_outer(plan, left, right, out),
    }
    for sizes in TILES[:1] if run.small else TILES:
        tile = Tile(*sizes)
        name = "outer {}x{}x{} warps {} stages {} group {}".format(*sizes)
        ways[name] = lambda tile=tile: fused_outer(plan, left, right, out, tile=tile)
    return ways


def passes(run: Run) -> Iterator[Line]:
    """Whole passes: time beside a training step, memory, tokens and share of the matrix rate."""
    for model in gpumodels.SMALL if run.small else gpumodels.MODELS:
        try:
            found = interleaved(gpumodels.passes(model, run.device), run.device, 6 * run.seconds)
            base = found["training step"]
            for name, timed in found.items():
                yield line(
                    "passes", model.name, name, timed, *_beside(base, timed, model, name, run)
                )
        except Exception as error:
            yield {"section": "passes", "case": model.name, "error": described(error)}
        if run.device == "cuda":
            torch.cuda.empty_cache()


def _beside(
    base: Timed, timed: Timed, model: gpumodels.Model, what: str, run: Run
) -> tuple[Any, ...]:
    if base.error or timed.error:
        return (None,)
    more = {
        "tokens per second": model.rows * model.tokens / timed.median,
        "peak GiB": timed.peak / 2**30,
        "peak beside step": timed.peak / base.peak if base.peak else None,
    }
    more["share"] = _share(run, gpumodels.operations(model, what) / timed.median)
    return base.median, more


def after(run: Run) -> Iterator[Line]:
    """Scores of 64 queries × 8 steps, CountSketch of vectors, and int8 both ways."""
    rows, dim, queries = (64, 32, 2) if run.small else (65536, 4096, 64)
    train = torch.randn(rows, dim, device=run.device)
    query = torch.randn(queries, 8, dim, device=run.device)
    half, flat = train.bfloat16(), query.flatten(0, 1).bfloat16()
    stored, scale = quantize(train)
    plan = Hashing(dim, 0, "").plan("bias", (3 * dim,), run.device)
    gradient = torch.randn(max(1, rows // 8), 3 * dim, device=run.device)
    sums = torch.zeros(gradient.shape[0], dim, device=run.device)
    work: dict[str, Work] = {
        "product bf16": lambda: half @ flat.T,
        "int8 to bf16, product": lambda: (stored.bfloat16() @ flat.T) * scale[:, None],
        "sdi.influence bf16": lambda: sdi.influence(half[:, None], flat.view(queries, 8, dim)),
        "sdi.influence float32": lambda: sdi.influence(train[:, None], query),
        "quantize": lambda: quantize(train),
        "dequantize": lambda: dequantize(stored, scale),
        "CountSketch": lambda: add_dense(plan, gradient, sums),
    }
    found = interleaved(work, run.device, run.seconds)
    base = found["product bf16"].median
    for name, timed in found.items():
        if timed.error:
            yield line("after", f"{rows} rows, m={dim}", name, timed)
            continue
        count = len(gradient) if name == "CountSketch" else rows
        more: Line = {"rows per second": count / timed.median}
        if "quantize" in name:
            more["copy share"] = 5 * rows * dim / timed.median / run.rates.get("copy", float("nan"))
        yield line("after", f"{rows} rows, m={dim}", name, timed, base, more)


def _share(run: Run, rate: float) -> float | None:
    """Of the card's own matrix rate, where that was measured."""
    return rate / run.rates["product"] if "product" in run.rates else None


def line(
    section: str,
    case: str,
    what: str,
    timed: Timed,
    base: float | None = None,
    more: Line | None = None,
    **also: Any,
) -> Line:
    """A line of the table; ratios are to `base` seconds."""
    found: Line = {"section": section, "case": case, "what": what}
    if timed.error:
        return {**found, "error": timed.error}
    found |= {"seconds": timed.median, "rounds": len(timed.seconds)}
    if base:
        low, middle, high = timed.ratios(base)
        found |= {"ratio": middle, "quartiles": [low, high]}
    return {**found, **(more or {}), **also}


def printed(found: Line) -> str:
    """One line of text."""
    seconds, ratio = found.get("seconds"), found.get("ratio")
    known = ("section", "case", "what", "seconds", "rounds", "ratio", "quartiles", "worst shape")
    rest = [
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in found.items()
        if key not in known and value is not None
    ]
    return (
        f"{found['section']:<9}{found['case']:<40}{found.get('what', ''):<44}"
        f"{'' if seconds is None else f'{1000 * seconds:.3f}':>10}"
        f"{'' if ratio is None else f'{ratio:.2f}':>8}  {', '.join(rest)}"
    )


SECTIONS: dict[str, Callable[[Run], Iterator[Line]]] = {
    section.__name__: section for section in (rate, check, kernels, passes, after)
}


def measured(run: Run, sections: list[str]) -> list[Line]:
    """The lines of the sections asked for, those that failed with their errors."""
    lines: list[Line] = []
    for name in sections:
        try:
            for found in SECTIONS[name](run):
                lines.append(found)
                sys.stderr.write(printed(found) + "\n")
        except Exception as error:
            lines.append({"section": name, "case": "", "error": described(error)})
            sys.stderr.write(printed(lines[-1]) + "\n")
    return lines


def main() -> int:
    """Run, print the table, write the lines; 1 where anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu")
    parser.add_argument("--section", action="append", choices=sorted(SECTIONS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not given.small:
        parser.error("there is no GPU here: add --small to try the script on the CPU")
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    lines = measured(Run(device, given.small, {}), given.section or list(SECTIONS))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    sys.stdout.write(f"{name}, torch {torch.__version__}\n")
    sys.stdout.write(f"{'section':<9}{'case':<40}{'what':<44}{'ms':>10}{'ratio':>8}  more\n")
    sys.stdout.write("\n".join(printed(found) for found in lines) + "\n")
    if given.json:
        about = {"device": name, "torch": torch.__version__, "small": given.small}
        given.json.write_text(json.dumps({**about, "lines": lines}, indent=1) + "\n")
    return 1 if any("error" in found for found in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
