"""Models by name: `hf:DIR` (a Hugging Face directory) or `file.py:callable` beside a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.callables import load_callable
from curate.errors import UsageError

if TYPE_CHECKING:
    import torch


def build_model(
    source: str, args: Mapping[str, Any], folder: Path, *, trust_code: bool = False
) -> torch.nn.Module:
    """A new model in eval mode; its weights are whatever the callable or the directory gives.

    Raises UsageError where the callable refuses its arguments or does not return a module.
    """
    import torch

    if source.startswith("hf:"):
        return _from_directory(source.removeprefix("hf:"), args, folder)
    build = load_callable(source, folder, trust_code=trust_code)
    try:
        model = build(**args)
    except TypeError as failure:
        raise UsageError(f"{source} refused its arguments {dict(args)}: {failure}") from failure
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{source} returned {type(model).__name__}; expected a torch Module")
    return model.eval()


def _from_directory(name: str, args: Mapping[str, Any], folder: Path) -> torch.nn.Module:
    """A causal language model, or what its config says it is, never running remote code."""
    path = next((p for p in (Path(name), folder / name) if p.is_dir()), None)
    path = _base_of(path) if path is not None else None
    if path is None or not (path / "config.json").is_file():
        raise UsageError(f"hf:{name} is not a directory with a config.json")
    try:
        import transformers
    except ImportError:
        raise UsageError("hf: models need transformers: pip install 'sdi-curate[hf]'") from None
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    kind = next((cls for cls in named if cls is not None), transformers.AutoModelForCausalLM)
    model = kind.from_pretrained(path, **args)
    return model.eval()  # type: ignore[no-any-return]


def _base_of(path: Path) -> Path:
    """The directory itself or, for an adapter's, that of the model it goes onto."""
    from sdi.adapters import Adapter, is_adapter

    if (path / "config.json").is_file() or not is_adapter(path):
        return path
    adapter = Adapter.read(path)
    if adapter.base is None:
        named = adapter.settings.get("base_model_name_or_path")
        raise UsageError(
            f"{path} is an adapter on {named!r}, which is no directory here; give the base model "
            "as hf:DIR and the adapter under `checkpoints`"
        )
    return adapter.base
