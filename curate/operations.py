"""The registry of operations: what each step of a recipe does, and each verb of the command line.

Thin on purpose: the work is in the modules that are called. What stands here is how a recipe's
sections become their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate import verbs
from curate.callables import load_callable
from curate.errors import UsageError
from curate.pipeline import Job, Tables
from curate.recipe import SketchSection, expand

if TYPE_CHECKING:
    import torch

    from curate.examples import ExampleSet
    from sdi.checkpoints import Checkpoint


def perform(step: str, job: Job) -> Tables:
    """Do one step of a recipe; returns the tables that it wants printed, by title."""
    if step in REGISTRY:
        return REGISTRY[step](job) or {}
    return own_step(step, job)


def own_step(step: str, job: Job) -> Tables:
    """Call the recipe's own code for generate, train, retrain or compare."""
    import polars as pl

    section = getattr(job.recipe, step)
    call = load_callable(section.call, job.folder, trust_code=job.trust_code)
    result = call(job.context, **expand(section.args, run=job.path))
    if result is None:
        return {}
    if isinstance(result, pl.DataFrame):
        return {step: result}
    if isinstance(result, Mapping) and all(isinstance(t, pl.DataFrame) for t in result.values()):
        return dict(result)
    raise UsageError(
        f"{section.call} returned {type(result).__name__}; expected None, a table, or a mapping "
        "of titles to tables"
    )


# -- sketch -------------------------------------------------------------------------------------


def sketch(job: Job) -> None:
    """Read the data sets, and sketch what is missing at every checkpoint."""
    from curate.models import build_model
    from curate.sketching import LoopOptions, sketch_run

    recipe = job.recipe
    sets = prepare_sets(job)
    model = recipe.model
    report = sketch_run(
        job.run,
        lambda: build_model(model.source, model.args, job.folder, trust_code=job.trust_code),
        LoopOptions(
            recipe.loop.body,
            recipe.loop.tied,
            recipe.loop.skip or (),
            bool(recipe.loop.full_graph),
            bool(recipe.loop.seeded_rows),
        ),
        found_checkpoints(job),
        {name: examples for name, examples in sets.items() if examples.role != "eval"},
        _sketch_options(job),
        job.console.progress,
        model_spec=model.model_dump(mode="json"),
    )
    rows = ", ".join(f"{count:,} rows of {name}" for name, count in report.rows.items())
    job.console.log(f"      sketched {rows}" if rows else "      nothing was missing")
    if report.repeated:
        job.console.log(
            f"      {report.repeated:,} of these sketches were made again in float32: in bfloat16 "
            "their rounding might have shown"
        )


def prepare_sets(job: Job) -> dict[str, ExampleSet]:
    """Every data set of the recipe, read into the run; overlaps of train and the others flagged."""
    from curate.examples import flag_overlap
    from curate.loading import Loader

    sets: dict[str, ExampleSet] = {}
    with job.run.writing() as run, Loader() as loader:
        for name, spec in job.recipe.specs(job.path).items():

            def progress(done: int, total: int, label: str = f"read {name}") -> None:
                job.console.progress(label, done, total)

            loaded = loader.load(
                spec, run.stage(name), name=name, known_ids=run.fixed_ids(name), progress=progress
            )
            sets[name] = run.add_set(loaded)
        others = [examples for examples in sets.values() if examples.role != "train"]
        for name, examples in sets.items():
            if examples.role == "train" and others:
                run.add_side(name, "leaks", flag_overlap(examples, others))
    return sets


def found_checkpoints(job: Job) -> tuple[Checkpoint, ...]:
    """The recipe's checkpoints; those of an `hf:` model without any are the directory itself."""
    from sdi.checkpoints import find_checkpoints

    sections = [section.model_dump(exclude_none=True) for section in job.recipe.checkpoints]
    source = job.recipe.model.source
    if not sections and source.startswith("hf:"):
        sections = [{"path": source.removeprefix("hf:")}]
    if not sections:
        raise UsageError("the recipe names no checkpoints; expected paths or globs")
    return find_checkpoints(expand(sections, run=job.path))


def _sketch_options(job: Job) -> Any:
    from curate.sketching import SketchOptions

    section = job.recipe.sketch
    settings = section.model_dump(exclude={"loss", "reduce"})
    return SketchOptions(loss=loss_of(section, job), **settings)


def loss_of(section: SketchSection, job: Job) -> Callable[..., torch.Tensor]:
    """The per-example loss that a sketch section names."""
    import sdi

    known = {"causal_lm": sdi.causal_lm_loss, "masked_lm": sdi.masked_lm_loss}
    if section.loss not in known:
        if ".py:" not in section.loss:
            raise UsageError(
                f"sketch.loss is {section.loss!r}; expected {', '.join(known)} or file.py:callable"
            )
        return load_callable(section.loss, job.folder, trust_code=job.trust_code)
    loss = known[section.loss]
    if section.reduce == "mean":
        return loss

    def summed(model: Any, batch: Any) -> torch.Tensor:
        return loss(model, batch, reduce="sum")

    summed.__name__ = f"{loss.__name__}_sum"  # the manifest records losses by name
    return summed


# -- what follows the sketches --------------------------------------------------------------------


def score(job: Job) -> None:
    """Score every query set that the recipe asks for."""
    for section in job.recipe.score:
        settings = section.model_dump(exclude={"query", "train"})
        names = verbs.score_one(
            job.path,
            section.query,
            {"train_set": section.train, "overwrite": job.overwrite, **settings},
            job.console,
        )
        job.console.log(f"      influence tables: {', '.join(names)}")


def index(job: Job) -> None:
    """Build the search index where it is missing or out of date."""
    section = job.recipe.index
    assert section is not None
    verbs.build_run_index(job.path, section.set, overwrite=job.overwrite, console=job.console)


def filter_step(job: Job) -> Tables:
    """Decide which rows are kept."""
    section = job.recipe.filter
    assert section is not None
    rules = section.model_dump(exclude={"query", "name"})
    table = verbs.filter_rows(job.path, section.query, section.name, rules, overwrite=job.overwrite)
    return {f"kept by selection {section.name}": table}


def reweight_step(job: Job) -> None:
    """Give the kept rows weights."""
    section = job.recipe.reweight
    assert section is not None
    settings = section.model_dump(exclude={"selection"})
    verbs.reweight_rows(job.path, section.selection, settings, overwrite=True)


def export_step(job: Job) -> None:
    """Write the selection as a dataset directory."""
    section = job.recipe.export
    assert section is not None
    line = verbs.export_selection(
        job.path,
        section.selection,
        Path(expand(section.directory, run=job.path)),
        columns=section.columns,
        overwrite=job.overwrite,
    )
    job.console.log(f"      {line}")


REGISTRY: dict[str, Callable[[Job], Tables | None]] = {
    "sketch": sketch,
    "score": score,
    "index": index,
    "filter": filter_step,
    "reweight": reweight_step,
    "export": export_step,
}
