"""Running a recipe: its steps in order, each skipped where it is done, continued where it is not.

What a step did is noted in the manifest with a signature: a hash over the step's own section, the
code it calls and the steps it builds on. `sketch`, `score` and `index` know themselves what is
missing, so they are called every time and do nothing where all is there. Every other step is
skipped while its signature is the noted one. Where it is not, the recipe has changed under results
that exist, and nothing is replaced until `--from STEP` says so.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate import cookbook
from curate.callables import StepContext, file_hash, locate, trusted_file
from curate.console import Console
from curate.errors import UsageError
from curate.recipe import CALLS, OPERATIONS, Recipe, expand
from curate.rundir import MANIFEST, RunDirectory

if TYPE_CHECKING:
    import polars as pl

    from curate.manifest import Manifest

#: Steps that find out by themselves what is missing.
INCREMENTAL = ("sketch", "score", "index")
#: What a step's signature depends on beside its own section and the step before it.
ALSO = {"train": ("model",), "sketch": ("model", "loop", "checkpoints"), "retrain": ("model",)}
RECIPE_FILE = "recipe.yaml"

Tables = dict[str, "pl.DataFrame"]


@dataclass(frozen=True)
class Job:
    """A recipe, where it runs and how: what every operation is given.

    Attributes:
        recipe: the settled recipe.
        folder: the folder of its file, where its code is.
        path: the run directory.
        trust_code: whether code that is not shipped with the package may run.
        overwrite: whether results of earlier settings may be replaced.
        console: where progress and log lines go.
    """

    recipe: Recipe
    folder: Path
    path: Path
    trust_code: bool = False
    overwrite: bool = False
    console: Console = field(default_factory=Console)

    @property
    def run(self) -> RunDirectory:
        """The run directory, which must exist by now."""
        return RunDirectory.open(self.path)

    @property
    def context(self) -> StepContext:
        """What the recipe's own callables are called with."""
        return StepContext(
            run=self.path,
            recipe=self.recipe,
            folder=self.folder,
            trust_code=self.trust_code,
            overwrite=self.overwrite,
            log=self.console.log,
            progress=self.console.progress,
        )


def run_recipe(job: Job, *, from_step: str | None = None) -> Tables:
    """Run the recipe's steps into `job.path`, and return the tables of its own steps by title.

    Raises UsageError for code that is not trusted or a step whose settings changed, and whatever
    a step raises; what was finished before stays finished.
    """
    signatures = signed(job)
    run = _opened(job, from_step)
    if from_step is not None:
        _forget(run, cookbook.step_named(from_step, job.recipe), job.recipe)
    tables: Tables = {}
    again = False
    for number, step in enumerate(job.recipe.order, 1):
        again = again or step == from_step
        state = state_of(step, run, signatures)
        if state == "changed" and not job.overwrite:
            raise UsageError(
                f"step {step} was done with other settings; redo it with --from {step}, or choose "
                "another directory with --into"
            )
        job.console.log(f"[{number}/{len(job.recipe.order)}] {step}: {_announced(step, state)}")
        if state == "done" and step not in INCREMENTAL:
            tables |= _kept_tables(job.path, step)
            continue
        tables |= _performed(replace(job, overwrite=job.overwrite or again), step)
        _note(run, step, signatures[step])
    return tables


def _announced(step: str, state: str) -> str:
    if state == "done":
        return "checking what is missing" if step in INCREMENTAL else "done before"
    return "again, with other settings" if state == "changed" else "running"


def _performed(job: Job, step: str) -> Tables:
    from curate import operations

    started = time.monotonic()
    tables = operations.perform(step, job)
    if step in CALLS:
        _keep_tables(job.path, step, tables)
    job.console.log(f"      {step}: {time.monotonic() - started:.1f} s")
    return tables


# -- what is done, and what changed -------------------------------------------------------------


def signed(job: Job) -> dict[str, str]:
    """The signature of each step; also refuses code that is missing or not trusted."""
    recipe = job.recipe.resolved()
    signatures: dict[str, str] = {}
    before = ""
    for step in job.recipe.order:
        parts = {key: recipe.get(key) for key in (step, *ALSO.get(step, ()))}
        if step in CALLS and getattr(job.recipe, step) is None:
            raise UsageError(f"steps names {step}, but the recipe has no section {step!r}")
        codes = [_code(job, source) for source in _sources(parts)]
        if step in ("train", "sketch", "retrain"):
            parts["train set"] = job.recipe.data.get("train")
        text = json.dumps([before, step, parts, codes], sort_keys=True)
        before = signatures[step] = hashlib.sha256(text.encode()).hexdigest()
    return signatures


def _sources(parts: dict[str, Any]) -> list[str]:
    """The `file.py:callable`s of some sections; their paths are taken out of `parts`."""
    found = []
    for section in parts.values():
        for key in ("call", "source"):
            if isinstance(section, dict) and ".py:" in str(section.get(key)):
                found.append(section.pop(key))
    return found


def _code(job: Job, source: str) -> str:
    """What the code of a source is, whatever folder it is in."""
    path, name = locate(source, job.folder)
    return f"{path.name}:{name} {file_hash(trusted_file(path, trust_code=job.trust_code))}"


def state_of(step: str, run: RunDirectory | None, signatures: dict[str, str]) -> str:
    """`to do`, `done`, or `changed` where it was done with other settings."""
    noted = run.manifest.details.get("steps", {}).get(step) if run is not None else None
    if noted is None:
        return "to do"
    if noted["signature"] == signatures[step]:
        return "done"
    # new sets, checkpoints and queries are what these steps add by themselves
    return "to do" if step in INCREMENTAL else "changed"


def _note(run: RunDirectory, step: str, signature: str) -> None:
    entry = {"signature": signature, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    _change_steps(run, lambda steps: {**steps, step: entry})


def _change_steps(run: RunDirectory, change: Any) -> None:
    def changed(manifest: Manifest) -> Manifest:
        steps = change(manifest.details.get("steps", {}))
        return manifest.model_copy(update={"details": {**manifest.details, "steps": steps}})

    with run.writing():
        run.update(changed)


def _forget(run: RunDirectory, step: str, recipe: Recipe) -> None:
    """Take what `step` and those after it made out of the manifest, so that it is made again."""
    later = OPERATIONS[OPERATIONS.index(step) :]
    empty: dict[str, Any] = {}
    if "sketch" in later:
        empty |= {"sets": {}, "model": None, "loop": None, "checkpoints": ()}
        empty |= {"sketch": None, "shards": (), "self_check": {}}
    if "score" in later:
        empty |= {"influence": {}}
    if "index" in later:
        empty |= {"indexes": {}}
    if "filter" in later:
        empty |= {"selections": {}}
    order = recipe.order[recipe.order.index(step) :]
    with run.writing():
        run.note(**empty)
    _change_steps(run, lambda steps: {k: v for k, v in steps.items() if k not in order})


# -- the run directory ----------------------------------------------------------------------------


def _opened(job: Job, from_step: str | None) -> RunDirectory:
    """The run directory, made where there is none, holding the resolved recipe."""
    if from_step is None and job.path.is_dir() and not (job.path / MANIFEST).exists():
        strangers = [p.name for p in job.path.iterdir()]
        if strangers:
            raise UsageError(
                f"{job.path} is not a run and not empty (it holds {sorted(strangers)[0]}); choose "
                "another directory with --into"
            )
    job.path.mkdir(parents=True, exist_ok=True)
    run = RunDirectory.open_or_create(job.path, recipe_hash=job.recipe.hash())
    store_recipe(job)
    return run


def store_recipe(job: Job) -> None:
    """Write the settled recipe into the run, and its hash into the manifest."""
    import yaml

    from curate import atomic

    text = yaml.safe_dump(job.recipe.resolved(), sort_keys=False, allow_unicode=True)
    with job.run.writing() as run:
        if run.manifest.recipe_hash != job.recipe.hash():
            run.note(recipe_hash=job.recipe.hash())
        atomic.write_text(job.path / RECIPE_FILE, text)


def reopened(path: Path, overrides: tuple[str, ...] = (), **options: Any) -> Job:
    """The job of a run that exists, from the recipe inside it, for the commands of single steps."""
    RunDirectory.open(path)
    file = path / RECIPE_FILE
    if not file.is_file():
        raise UsageError(f"{path} has no {RECIPE_FILE}; only `curate run` can say what to sketch")
    recipe, folder = cookbook.load_recipe(str(file), overrides)
    return Job(recipe, folder, path, **options)


def planned(job: Job) -> list[dict[str, str]]:
    """One row per step for `--dry-run`: its name, its state, and its settings on one line."""
    from curate.strict import flat

    signatures = signed(job)
    run = job.run if (job.path / MANIFEST).exists() else None
    rows = []
    for step in job.recipe.order:
        section = expand(job.recipe.resolved().get(step, {}), run=job.path)
        listed = section if isinstance(section, list) else [section]
        text = "; ".join(
            " ".join(f"{key}={value}" for key, value in flat(item).items()) for item in listed
        )
        rows.append({"step": step, "state": state_of(step, run, signatures), "settings": text})
    return rows


# -- tables of the recipe's own steps -------------------------------------------------------------


def _keep_tables(path: Path, step: str, tables: Tables) -> None:
    """Store what a step printed, so that a later run of the same recipe prints it again."""
    from curate import atomic

    folder = path / "reports" / step
    for number, (title, table) in enumerate(tables.items()):
        atomic.write_table(folder / f"{number:02}.parquet", table)
        atomic.write_text(folder / f"{number:02}.title", title)


def _kept_tables(path: Path, step: str) -> Tables:
    import polars as pl

    files = sorted((path / "reports" / step).glob("*.parquet"))
    return {file.with_suffix(".title").read_text("utf-8"): pl.read_parquet(file) for file in files}
