"""LoRA adapters as PEFT saves them: ``adapter_config.json`` beside ``adapter_model.safetensors``.

An adapter is put onto a model in one of two ways. A model that has the adapter's own parameters
(built with peft) gets their values, and they are what is attributed. A plain model gets the sum

    W + s·B A,    s = alpha / r, or alpha / √r with use_rslora (Hu et al. 2021; Kalajdzievski 2023)

in each weight that the adapter is on, and attribution is to these weights. Only what makes exactly
that sum is merged: the configuration is read against a list of settings that change nothing, and
any other one that is switched on is refused by its name. peft itself is not needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdi.errors import CheckpointError
from sdi.fitting import Tensors, canonical, canonical_name, fit, problems, some, targets_of
from sdi.weight_files import ADAPTER_CONFIG, read_weights

# Settings that a merge takes into account, and those that change nothing about it.
_KNOWN = {
    "peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern",
    "alpha_pattern", "init_lora_weights", "bias", "lora_bias", "modules_to_save",
    "base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "lora_dropout", "task_type", "auto_mapping", "inference_mode", "revision",
    "peft_version", "megatron_core", "qalora_group_size", "eva_config",
}  # fmt: skip
# Other initialisations take the adapter's first value out of the base's weights.
_INITS = (True, False, "gaussian", "eva", "orthogonal")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_\w+?)(?:\.(?P<kind>weight|bias))?")

# Models whose weights are a merge already, and so no base for another one.
_MERGED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class Adapter:
    """An adapter's directory, its settings, and the directory of its base where that is there."""

    path: Path
    settings: Mapping[str, Any]
    base: Path | None

    @classmethod
    def read(cls, path: Path) -> Adapter:
        """Read the configuration of the adapter at `path`.

        Raises:
            CheckpointError: it is no JSON, or another kind of adapter than LoRA.
        """
        directory = path if path.is_dir() else path.parent
        try:
            settings = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{directory / ADAPTER_CONFIG} is not JSON ({error}); save the adapter again"
            ) from error
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        if kind != "LORA":
            raise CheckpointError(
                f"{directory} is an adapter of type {kind}; expected LORA. Merge it with peft "
                "(merge_and_unload) and save the whole model"
            )
        named = settings.get("base_model_name_or_path")
        places = [Path(named), directory / named] if isinstance(named, str) and named else []
        base = next((place for place in places if place.is_dir()), None)
        if base is not None and is_adapter(base):
            raise CheckpointError(f"{directory} has the adapter {base} as its base; merge that one")
        return cls(directory, settings, base)

    def scaling(self, module: str, rank: int) -> float:
        """The factor s of the product B A on a module.

        Raises:
            CheckpointError: the rank is not the one that the settings give.
        """
        expected = _by_pattern(self.settings.get("rank_pattern"), module, self.settings.get("r"))
        alpha = _by_pattern(
            self.settings.get("alpha_pattern"), module, self.settings.get("lora_alpha")
        )
        if rank != expected or isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise CheckpointError(
                f"{self.path} has rank {rank} on {module}, and its settings rank {expected!r} and "
                f"alpha {alpha!r}; save the adapter again"
            )
        return float(alpha) / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def refuse_unmergeable(self) -> None:
        """Raise CheckpointError where the settings make anything but W + s·B A."""
        active = [name for name, on in self.settings.items() if on and name not in _KNOWN]
        init = self.settings.get("init_lora_weights", True)
        if init not in _INITS:
            active.append(f"init_lora_weights={init!r}")
        if active:
            raise CheckpointError(
                f"{self.path} cannot be merged as W + s·B·A, since it uses {some(active)}. Build "
                "the model with peft, or merge with peft (merge_and_unload) and save the model"
            )


def is_adapter(path: Path) -> bool:
    """True for an adapter's directory, or its file of weights in it."""
    if path.is_file():
        return path.name.startswith("adapter_model.") and (path.parent / ADAPTER_CONFIG).is_file()
    return (path / ADAPTER_CONFIG).is_file()


def has_adapter(model: nn.Module) -> bool:
    """True for a model with an adapter's own parameters."""
    return bool(_adapter_names(name for name, _ in model.named_parameters()))


def base_weights(model: nn.Module) -> Tensors:
    """Copies of all the weights of a model that has just been built, to put adapters onto."""
    return {name: v.detach().to("cpu", copy=True) for name, v in targets_of(model).items()}


def needed_base(model: nn.Module, paths: Sequence[Path]) -> Tensors | None:
    """The base weights of a new model, where its checkpoints would otherwise write over them."""
    adapters = [is_adapter(path) for path in paths]
    if not any(adapters) or (all(adapters) and has_adapter(model)):
        return None
    return base_weights(model)


def base_digest(model: nn.Module) -> str:
    """Hex digest of the weights that an adapter is put onto, names, dtypes and shapes included."""
    digest = hashlib.sha256()
    for name, value in sorted(targets_of(model).items()):
        if _own_part(name):
            continue
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        plain = value.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def note_loaded(model: nn.Module, *, merged: bool) -> None:
    """Remember whether a model's weights are now a merge."""
    if merged and not has_adapter(model):
        _MERGED.add(model)
    else:
        _MERGED.discard(model)


def adapted(
    model: nn.Module,
    adapter: Adapter,
    targets: Mapping[str, Tensor],
    base: Mapping[str, Tensor] | None,
) -> Tensors:
    """What the model's weights are with the adapter on its base, by canonical name.

    Args:
        model: with the adapter's own parameters, or plain.
        adapter: what to put onto it.
        targets: the model's own tensors.
        base: the weights below; the adapter's own directory of them goes before.

    Raises:
        CheckpointError: what does not fit or cannot be merged, by name.
    """
    read = canonical(read_weights(adapter.path), str(adapter.path))
    short = {name.removeprefix(_PREFIX): value for name, value in read.items()}
    stored = {n if _FACTOR.fullmatch(n) else _plain_name(n): v for n, v in short.items()}
    if base is not None and (wrong := problems(targets, base)):
        raise CheckpointError(f"the base given is not of this model: {'; '.join(wrong)}")
    if has_adapter(model):
        return _onto_own(model, adapter, stored, targets, base)
    return _merged(model, adapter, stored, targets, base)


# -- a model that has the adapter's parameters ----------------------------------------------------


def _onto_own(
    model: nn.Module,
    adapter: Adapter,
    stored: Tensors,
    targets: Mapping[str, Tensor],
    base: Mapping[str, Tensor] | None,
) -> Tensors:
    name = _active(model)
    _check_scaling(model, adapter, name)
    own = {_saved_name(t, name): t for t in targets if _own_part(t) == name}
    below = {_plain_name(t): t for t in targets if not _own_part(t)}
    values: Tensors = {}
    if adapter.base is not None:
        get_base = getattr(model, "get_base_model", None)
        inner = get_base() if callable(get_base) else model
        kept = {plain: targets[target] for plain, target in below.items()}
        found = fit(inner, read_weights(adapter.base), kept, f"{adapter.base} (the base)")
        values = {below[plain]: value for plain, value in found.items()}
    elif base is not None:
        values = {target: base[target] for target in below.values()}
    # Biases that were trained along with the adapter stand in the base's place.
    expected = own | {n: below[n] for n in stored if n in below and n not in own}
    wrong = problems({n: targets[t] for n, t in expected.items()}, stored)
    if wrong:
        raise CheckpointError(
            f"{adapter.path} is not an adapter of this model: {'; '.join(wrong)}. Build the model "
            "with the settings that the adapter was trained with"
        )
    return values | {expected[n]: value for n, value in stored.items()}


def _check_scaling(model: nn.Module, adapter: Adapter, name: str) -> None:
    """The factor is no tensor: a model built with another alpha would take any adapter."""
    for module_name, module in model.named_modules():
        scaling, ranks = getattr(module, "scaling", None), getattr(module, "r", None)
        if not isinstance(scaling, dict) or not isinstance(ranks, dict) or name not in scaling:
            continue
        plain = _plain_name(canonical_name(module_name))
        expected = adapter.scaling(plain, int(ranks[name]))
        if not math.isclose(float(scaling[name]), expected, rel_tol=1e-9):
            raise CheckpointError(
                f"the model scales the adapter on {plain} by {scaling[name]:g} and {adapter.path} "
                f"was trained with {expected:g}; build the model with its r, lora_alpha and "
                "use_rslora"
            )


def _active(model: nn.Module) -> str:
    """The name of the model's one adapter, or of the one that is active."""
    names = _adapter_names(name for name, _ in model.named_parameters())
    active = getattr(model, "active_adapter", None)
    if len(names) > 1 and not (isinstance(active, str) and active in names):
        raise CheckpointError(f"the model has several adapters ({some(sorted(names))}); keep one")
    return active if len(names) > 1 and isinstance(active, str) else next(iter(names))


def _adapter_names(names: Iterable[str]) -> set[str]:
    return {part for name in names if (part := _own_part(canonical_name(name)))}


def _own_part(name: str) -> str:
    """The adapter that a parameter belongs to, or an empty string."""
    parts = name.split(".")
    for before, after in pairwise(parts):
        if before.startswith("lora_") or before == "modules_to_save":
            return after
    return ""


def _plain_name(name: str) -> str:
    """A name in the model below an adapter."""
    parts = name.rpartition(_PREFIX)[2].split(".")
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))


def _saved_name(name: str, adapter: str) -> str:
    """The name under which peft saves an adapter's parameter."""
    parts = name.rpartition(_PREFIX)[2].split(".")
    kept = [
        part
        for before, part in zip(["", *parts], parts, strict=False)
        if not (part == adapter and (before.startswith("lora_") or before == "modules_to_save"))
    ]
    saved = ".".join(part for part in kept if part != "modules_to_save")
    return saved.removesuffix(".weight") if "lora_magnitude_vector" in saved else saved


# -- a plain model --------------------------------------------------------------------------------


def _merged(
    model: nn.Module,
    adapter: Adapter,
    stored: Tensors,
    targets: Mapping[str, Tensor],
    base: Mapping[str, Tensor] | None,
) -> Tensors:
    adapter.refuse_unmergeable()
    if adapter.base is not None:
        values = fit(model, read_weights(adapter.base), targets, f"{adapter.base} (the base)")
    elif base is not None:
        values = dict(base)
    elif model in _MERGED:
        raise CheckpointError(
            f"another adapter is merged into this model already, so {adapter.path} has no base to "
            "go onto; give `base`, the base_weights of the model as it was built"
        )
    else:
        values = {}
    by_tensor = {id(targets[name]): value for name, value in values.items()}
    merge = _Merge(model, adapter, targets, by_tensor)
    for module, parts in _factors(stored).items():
        values |= merge.sums(module, parts)
    replaced = {n: v for n, v in stored.items() if not _FACTOR.fullmatch(n)}
    for name, value in replaced.items():
        if name not in targets or targets[name].shape != value.shape:
            raise merge.refusal(f"it replaces {name} {tuple(value.shape)}, which the model lacks")
        merge.refuse_shared(name)
    return values | replaced


def _factors(stored: Mapping[str, Tensor]) -> dict[str, Tensors]:
    """Module name → its factors by their part of the name, such as lora_A and lora_B.bias."""
    found: dict[str, Tensors] = {}
    for name, value in stored.items():
        if match := _FACTOR.fullmatch(name):
            part = match["part"] + (".bias" if match["kind"] == "bias" else "")
            found.setdefault(match["module"], {})[part] = value
    return found


@dataclass(frozen=True)
class _Merge:
    """Adds one adapter to one model's weights; `values` are the base's by the id of the target."""

    model: nn.Module
    adapter: Adapter
    targets: Mapping[str, Tensor]
    values: Mapping[int, Tensor]

    def sums(self, name: str, parts: Mapping[str, Tensor]) -> Tensors:
        """The new weight of one module, and its bias where the adapter has one."""
        left, right, transposed = self._kind(name, parts)
        weight = self._below(f"{name}.weight")
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        scale = self.adapter.scaling(name, right.shape[0])
        delta = scale * (left.to(wide) @ right.to(wide))
        delta = delta.T if transposed else delta
        if delta.shape != weight.shape:
            raise self.refusal(f"{name} is {tuple(weight.shape)}, not {tuple(delta.shape)}")
        found = {f"{name}.weight": weight.to(wide) + delta}
        if (shift := parts.get("lora_B.bias")) is not None:
            bias = self._below(f"{name}.bias")
            found[f"{name}.bias"] = bias.to(wide) + scale * shift.to(wide)
        return found

    def refusal(self, what: str) -> CheckpointError:
        """An error that says what cannot be merged."""
        return CheckpointError(
            f"{self.adapter.path} cannot be merged into this {type(self.model).__name__}: {what}. "
            "Give the model it was trained on, or build the model with peft"
        )

    def refuse_shared(self, name: str) -> None:
        """An adapter on one of two tied weights unties them, which a merge cannot."""
        same = [n for n, value in self.targets.items() if value is self.targets[name]]
        if len(same) > 1:
            raise self.refusal(f"{some(same)} are one tied weight, and the adapter is on one")

    def _kind(self, name: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, bool]:
        """B (out, r), A (r, in) and whether the weight is stored as (in, out)."""
        modules = {canonical_name(n): module for n, module in self.model.named_modules()}
        if name not in modules:
            raise self.refusal(f"the model has no {name}")
        module = modules[name]
        embedding = isinstance(module, nn.Embedding)
        known = embedding or isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        keys = ("lora_embedding_B", "lora_embedding_A") if embedding else ("lora_B", "lora_A")
        odd = sorted(set(parts) - {*keys, "lora_B.bias"})
        if not known or odd or not all(key in parts and parts[key].ndim == 2 for key in keys):
            raise self.refusal(f"{name}, a {type(module).__name__}, has {some(sorted(parts))}")
        return parts[keys[0]], parts[keys[1]], not isinstance(module, nn.Linear)

    def _below(self, name: str) -> Tensor:
        """The base's weight, which must be the model's alone and of plain numbers."""
        target = self.targets.get(name)
        if target is None or not target.is_floating_point():
            raise self.refusal(f"the model has no {name} of floating-point numbers")
        self.refuse_shared(name)
        return self.values.get(id(target), target).detach().cpu()


def _by_pattern(patterns: Any, module: str, otherwise: Any) -> Any:
    """What the first pattern that matches a module's name, or the end of it, gives."""
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CheckpointError(
                f"an adapter's settings have {pattern!r} for a pattern ({error}); mend it"
            ) from error
    return otherwise
