"""Strict validation whose failure is one line: the key, what is wrong, the nearest legal key."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from curate.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], value: Any, where: str = "") -> Model:
    """`value` as a `model`, or a UsageError of one line that begins at `where`."""
    try:
        return model.model_validate(value)
    except ValidationError as failure:
        raise UsageError(explained(model, failure, where)) from None


def explained(model: type[BaseModel], failure: ValidationError, where: str = "") -> str:
    """One line for the first error of `failure`, an unknown key before anything else."""
    errors = failure.errors(include_url=False, include_context=False)
    errors.sort(key=lambda error: error["type"] != "extra_forbidden")
    error = errors[0]
    loc = [part for part in error["loc"] if not _is_tag(part)]
    name = ".".join(str(part) for part in ([where] if where else []) + loc)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if error["type"] == "extra_forbidden":
        return unknown_key(name, str(loc[-1]), legal_keys(model, loc[:-1])) + more
    if error["type"] == "missing":
        return f"{name} is missing; it is required{more}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}: {message}; got {error['input']!r:.80}{more}"


def unknown_key(name: str, key: str, legal: Sequence[str]) -> str:
    """The line for a key that is not legal at `name`, with the nearest one that is."""
    near = difflib.get_close_matches(key, legal, n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown key {name!r}{hint} (legal here: {', '.join(sorted(legal))})"


def legal_keys(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """Field names of the model that `loc` leads to, starting from `model`."""
    here: type[BaseModel] | None = model
    for part in loc:
        if here is None or isinstance(part, int):
            continue
        field = here.model_fields.get(str(part))
        here = _model_in(field.annotation) if field is not None else None
    return list(here.model_fields) if here is not None else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first pydantic model inside a type such as `tuple[X, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        found = (_model_in(inner) for inner in typing.get_args(annotation))
        return next((inner for inner in found if inner is not None), None)
    return None


def _is_tag(part: Any) -> bool:
    """Pydantic puts names of union members and functions into a location; they are not keys."""
    return isinstance(part, str) and ("[" in part or "(" in part)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys, for printing."""
    out: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        out |= flat(item, f"{name}.") if isinstance(item, Mapping) and item else {name: item}
    return out
