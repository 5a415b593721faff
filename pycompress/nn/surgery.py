"""The only code that edits a model tree: find layers, match ``ignore`` lists, put a new layer in an old one's place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from .base import CompressedModule

Ignore = Iterable[str | type | nn.Module]


def all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all the paths under which it hangs (several for a shared module)."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def ignored(name: str, module: nn.Module, ignore: Ignore) -> bool:
    """Whether an ``ignore`` list names this layer: by path, glob pattern (``"encoder.*"``), type, or the module itself.

    A path also covers everything below it, so ``"head"`` ignores ``"head.0"``.
    """
    for entry in ignore:
        if isinstance(entry, str):
            if name == entry or name.startswith(entry + ".") or fnmatchcase(name, entry):
                return True
        elif isinstance(entry, type):
            if isinstance(module, entry):
                return True
        elif entry is module or any(part is module for part in entry.modules()):
            return True
    return False


def check_ignore(where: str, model: nn.Module, ignore: Ignore) -> list[str | type | nn.Module]:
    """Validate an ``ignore`` list before anything is changed. An entry that matches nothing raises ``ValueError``."""
    entries = [ignore] if isinstance(ignore, (str, type, nn.Module)) else list(ignore)
    modules = list(model.named_modules(remove_duplicate=False))
    for entry in entries:
        if not isinstance(entry, (str, type, nn.Module)):
            raise TypeError(f"{where}: ignore takes names, patterns, types or modules, got {type(entry).__name__}")
        if isinstance(entry, type) and not issubclass(entry, nn.Module):
            raise TypeError(f"{where}: ignore takes subclasses of nn.Module, got the type {entry.__name__}")
        if not isinstance(entry, type) and not any(ignored(name, module, [entry]) for name, module in modules):
            shown = repr(entry) if isinstance(entry, str) else f"a {type(entry).__name__}"
            raise ValueError(f"{where}: ignore entry {shown} matches no module of the model")
    return entries


def select(model: nn.Module, types: tuple[type, ...], ignore: Ignore = ()) -> dict[str, nn.Module]:
    """Layers of the given types that are not ignored, by their first path, each shared module once.

    A shared module is left out if any of its paths is ignored.
    """
    found = {}
    for module, names in all_names(model).items():
        if isinstance(module, types) and not any(ignored(name, module, ignore) for name in names):
            found[names[0]] = module
    return found


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever ``old`` hangs in the tree, keeping train/eval mode and, for a compressed layer that was told no
    ``weight_dtype``, the dtype of ``old``. Returns the model (``new`` if old is the root)."""
    new.train(old.training)
    if isinstance(new, CompressedModule) and "weight_dtype" not in vars(new):
        # Of a parameter, not of old.weight: a parametrized weight is computed on access, and observers would see it.
        new.weight_dtype = next((p.dtype for p in old.parameters() if p.is_floating_point()), new.weight_dtype)
    if model is old:
        return new
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
                forbid_fast_path(model, parent)
    return model


def forbid_fast_path(model: nn.Module, parent: nn.Module) -> None:
    """The fused kernel of ``nn.TransformerEncoderLayer`` reads the weights of its layers as float tensors and never calls them, so
    it must not run once one of them (``parent`` holds it) is replaced."""
    if not isinstance(parent, nn.TransformerEncoderLayer):
        return
    # The forward of the layer tests this attribute first; the slow path calls self.activation all the same.
    parent.activation_relu_or_gelu = 0
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(layer is parent for layer in encoder.layers):
            encoder.use_nested_tensor = False  # nested tensors are for the fast path only


def replace_all(
    model: nn.Module, make: Callable[[str, nn.Module], nn.Module | None], types: tuple[type, ...], ignore: Ignore = ()
) -> nn.Module:
    """Replace each selected layer by ``make(name, layer)``; None leaves the layer.

    All new layers are made before the first one is put in place, so an error leaves the model as it was.
    """
    pairs = [(layer, make(name, layer)) for name, layer in select(model, types, ignore).items()]
    for old, new in pairs:
        if new is not None:
            model = replace(model, old, new)
    return model
