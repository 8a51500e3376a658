"""A recipe: one strict YAML file that says what a run does, as frozen pydantic models.

A recipe names operations from a fixed registry (`OPERATIONS`); it can name code only as
`file.py:callable` beside itself, which needs `--trust-code` (see `curate.callables`).
Two placeholders stand in strings: `{run}` for the run directory, expanded at the last moment
so that a run directory can be moved, and `{recipe}` for the folder of the recipe file.
An unknown key anywhere is one line that names it and the nearest legal one.

A set of `data` may say `like: OTHER`: it then starts from the other set's description (path,
columns, tokenizer) without its choice of rows. `data.defaults` stands below every set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from curate.errors import UsageError

if TYPE_CHECKING:
    from curate.sources import DataSpec

#: The registry, in the order in which a recipe without `steps` runs what it has a section for.
OPERATIONS = (
    "generate",
    "train",
    "sketch",
    "score",
    "index",
    "filter",
    "reweight",
    "export",
    "retrain",
    "compare",
)
#: Operations that are a callable of the recipe's own, `{call: "file.py:callable", args: {…}}`.
CALLS = ("generate", "train", "retrain", "compare")
#: Keys of a data set that choose rows; `like` does not hand them on.
ROW_CHOICES = ("where", "limit", "role", "like")


def _listed(value: Any) -> Any:
    """One value stands for a list of one."""
    return value if isinstance(value, list | tuple) or value is None else [value]


def _as_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _as_query(value: Any) -> Any:
    return {"query": value} if isinstance(value, str) else value


def _as_call(value: Any) -> Any:
    return {"call": value} if isinstance(value, str) else value


class Strict(BaseModel):
    """A frozen section that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Strict):
    """`source` is `hf:DIR` or `file.py:callable`; `args` are the callable's keyword arguments."""

    source: str
    args: dict[str, Any] = {}

    @field_validator("source")
    @classmethod
    def _known_kind(cls, source: str) -> str:
        if source.startswith("hf:") or ".py:" in source:
            return source
        raise ValueError(f"model.source is {source!r}; expected hf:DIR or file.py:callable")


class LoopSection(Strict):
    """The body: a dotted module name or several; `tied` is false for an ordinary transformer.

    `skip` names parameters of the body (globs too) that are left out on request. `full_graph` lets
    loops that the model runs under no_grad take part; `seeded_rows` makes what the model draws at
    random a function of the row.
    """

    body: Annotated[tuple[str, ...], BeforeValidator(_listed)]
    tied: bool = True
    # None, so that recipes without it keep their hash
    skip: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = None
    full_graph: bool | None = None
    seeded_rows: bool | None = None


class CheckpointSection(Strict):
    """A path or glob of checkpoints and, where given, the name of one and its weight η.

    Without a weight the learning rates of the optimizer's parameter groups are read; one that is
    given is the rate of every parameter.
    """

    path: str
    name: str | None = None
    weight: float | None = Field(default=None, ge=0)


class SketchSection(Strict):
    """How examples become sketches; `dim` is M, `budget_tokens` the padded tokens of a batch.

    Without `budget_tokens` a budget that fits into memory is found, and kept by the run.
    `loss` is causal_lm, masked_lm, or `file.py:callable` that maps (model, batch) to losses (B,);
    `reduce` says whether the first two average or sum over a row's targets.
    """

    dim: int = Field(default=2048, ge=2)
    seed: int = 0
    store: Literal["steps", "totals"] = "steps"
    budget_tokens: int | None = Field(default=None, ge=1)
    shard_rows: int = Field(default=2048, ge=1)
    loss: str = "causal_lm"
    reduce: Literal["mean", "sum"] = "mean"
    method: Literal["auto", "outer", "fourier"] = "auto"
    products: Literal["auto", "bfloat16", "float32"] = "auto"
    check_rows: int = Field(default=2, ge=0)


class WindowSection(Strict):
    """Early and late steps: fractions of each query's own depth, or step numbers from 1."""

    early: tuple[float, float] = (0.0, 0.5)
    late: tuple[float, float] = (0.5, 1.0)
    unit: Literal["fraction", "step"] = "fraction"


class ScoreSection(Strict):
    """One query set scored against the training set, as a mean, by group and as max over groups.

    `weights` are other η for some checkpoints; `name` is that of the table, the set's if not said.
    """

    query: str
    train: str = "train"
    group_by: str | None = None
    kind: Literal["dot", "cosine"] = "dot"
    precondition: float | None = Field(default=None, gt=0)
    windows: WindowSection = WindowSection()
    contrast: Literal["standardised", "raw"] = "standardised"
    top_k: int = Field(default=100, ge=0)
    top_by: str = "total"
    max_by: str = "total"
    pairs: bool = False
    weights: dict[str, float] = {}
    name: str | None = None


class IndexSection(Strict):
    """The set whose step vectors are indexed."""

    set: str = "train"


class FilterSection(Strict):
    """Which rows are kept: see `curate filter --help`; the name is that of the selection."""

    query: str | None = None
    name: str = "curated"
    by: str = "total"
    descending: bool = True
    where: str | None = None
    top: int | None = Field(default=None, ge=1)
    fraction: float | None = Field(default=None, gt=0, le=1)
    quantile: float | None = Field(default=None, ge=0, le=1)
    round_robin: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    quotas: dict[str, float] = {}
    drop_leaks: bool = True


class ReweightSection(Strict):
    """Weights of the kept rows, mean one."""

    selection: str = "curated"
    method: Literal["softmax", "rank", "linear", "clip"] = "softmax"
    by: str | None = None
    temperature: float = Field(default=1.0, gt=0)
    low: float = Field(default=0.0, ge=0)
    high: float = Field(default=2.0, gt=0)


class ExportSection(Strict):
    """Where the selection is written as a dataset that `datasets.load_dataset` reads."""

    selection: str = "curated"
    directory: str = "{run}/export"
    columns: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = None


class CallSection(Strict):
    """A step of the recipe's own: `call` is `file.py:callable`, called with a StepContext."""

    call: str
    args: dict[str, Any] = {}


Call = Annotated[CallSection | None, BeforeValidator(_as_call)]


class Recipe(Strict):
    """A whole recipe; every section but `name`, `model`, `loop` and `data` may be left out."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    model: ModelSection
    loop: LoopSection
    checkpoints: Annotated[
        tuple[Annotated[CheckpointSection, BeforeValidator(_as_path)], ...],
        BeforeValidator(_listed),
    ] = ()
    data: dict[str, dict[str, Any]]
    generate: Call = None
    train: Call = None
    sketch: SketchSection = SketchSection()
    score: Annotated[
        tuple[Annotated[ScoreSection, BeforeValidator(_as_query)], ...],
        BeforeValidator(_listed),
    ] = ()
    index: IndexSection | None = None
    filter: FilterSection | None = None
    reweight: ReweightSection | None = None
    export: ExportSection | None = None
    retrain: Call = None
    compare: Call = None
    steps: tuple[Literal[OPERATIONS], ...] | None = None  # type: ignore[valid-type]

    @field_validator("data", mode="before")
    @classmethod
    def _settle_data(cls, data: Any) -> Any:
        return settle_data(data) if isinstance(data, Mapping) else data

    @property
    def order(self) -> tuple[str, ...]:
        """The operations this recipe runs, in order."""
        if self.steps is not None:
            return self.steps
        return tuple(name for name in OPERATIONS if getattr(self, name))

    def specs(self, run: Path | None = None) -> dict[str, DataSpec]:
        """The data sets by name, as `DataSpec`s, with `{run}` expanded where `run` is given."""
        from curate.sources import DataSpec
        from curate.strict import validated

        settled = expand(self.data, run=run) if run is not None else self.data
        return {name: validated(DataSpec, spec, f"data.{name}") for name, spec in settled.items()}

    def query_sets(self) -> tuple[str, ...]:
        """Names of the sets that some score section asks for, in order, each once."""
        return tuple(dict.fromkeys(section.query for section in self.score))

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data, ready to be written as YAML and read again."""
        return self.model_dump(mode="json", exclude_none=True)

    def hash(self) -> str:
        """sha256 of the resolved recipe."""
        text = json.dumps(self.resolved(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def settle_data(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every set with `defaults` and `like` filled in, and a bare path made a mapping."""
    raw = {name: _as_set(name, value) for name, value in data.items()}
    defaults = raw.pop("defaults", {})
    return {name: _settled(name, raw, defaults, ()) for name in raw}


def _as_set(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str | list):
        return {"path": value}
    if isinstance(value, Mapping):
        return dict(value)
    raise UsageError(f"data.{name} is {value!r}; expected a path or a mapping with `path`")


def _settled(
    name: str, raw: Mapping[str, dict[str, Any]], defaults: Mapping[str, Any], seen: tuple[str, ...]
) -> dict[str, Any]:
    own = raw[name]
    other = own.get("like")
    below: dict[str, Any] = dict(defaults)
    if other is not None:
        if other not in raw:
            raise UsageError(f"data.{name}.like is {other!r}; expected one of {sorted(raw)}")
        if other in (*seen, name):
            raise UsageError(
                f"data.{name}.like goes in a circle: {' → '.join((*seen, name, other))}"
            )
        settled = _settled(other, raw, defaults, (*seen, name))
        below |= {key: value for key, value in settled.items() if key not in ROW_CHOICES}
    merged = below | {key: value for key, value in own.items() if key != "like"}
    merged.setdefault("role", "train" if name == "train" else "query")
    return merged


def expand(value: Any, *, run: Path | None = None, recipe: Path | None = None) -> Any:
    """`value` with `{run}` and `{recipe}` replaced in every string inside it."""
    if isinstance(value, str):
        for mark, folder in (("{run}", run), ("{recipe}", recipe)):
            if folder is not None:
                value = value.replace(mark, str(folder))
        return value
    if isinstance(value, Mapping):
        return {key: expand(item, run=run, recipe=recipe) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [expand(item, run=run, recipe=recipe) for item in value]
    return value
