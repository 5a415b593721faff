"""Running a model over calibration data: what is a batch, and how nothing else in the model moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.inputs import split_inputs
from ..nn.surgery import all_names
from ..nn.untouched import untouched
from ..progress import track
from .calls import Calls, recording

Forward = Callable[[nn.Module, Any], Any]
_LABELS = ("labels", "label")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode, no gradients, every layer really called; training modes are put back at the end.

    (The fast path of ``nn.TransformerEncoderLayer`` reads the weights of its layers without calling them.)
    """
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode


def run_batches(
    where: str,
    model: nn.Module,
    data: Iterable[Any],
    *,
    example_inputs: Any = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> int:
    """Call the model on every batch and return their number. Raises ``ValueError`` if there is none.

    A batch is a tensor; a tuple or list of positional inputs followed by labels; or a mapping of keyword inputs. ``example_inputs``
    says how many positional inputs (or which keys) the model takes; without it the last entry of a tuple of two or more and the keys
    "labels" and "label" are taken for labels and dropped. ``forward(model, batch)`` replaces all that.
    """
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(f"{where}: data must be an iterable of batches, got {type(data).__name__}")
    batches: Iterable[Any] = [data] if isinstance(data, Tensor) else data
    total = len(batches) if isinstance(batches, Sized) else None
    count = 0
    for batch in track(batches, where, total=total, progress=progress):
        if forward is not None:
            forward(model, batch)
        else:
            args, kwargs = batch_inputs(where, batch, example_inputs)
            model(*args, **kwargs)
        count += 1
    if count == 0:
        raise ValueError(f"{where}: data must hold at least one batch, got none")
    return count


def batch_inputs(where: str, batch: Any, example_inputs: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for the model out of one batch, see ``run_batches``."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    known_args, known_kwargs = ((), {}) if example_inputs is None else split_inputs(where, example_inputs)
    if isinstance(batch, Mapping):
        missing = [name for name in known_kwargs if name not in batch]
        if missing:
            raise ValueError(f"{where}: batch must have the key {missing[0]!r} of example_inputs, got {', '.join(map(str, batch))}")
        return (), {name: value for name, value in batch.items() if (name in known_kwargs if known_kwargs else name not in _LABELS)}
    if isinstance(batch, (tuple, list)) and batch:
        number = len(known_args) if known_args else max(1, len(batch) - 1)
        if number > len(batch):
            raise ValueError(f"{where}: batch must have the {number} inputs of example_inputs, got {len(batch)}")
        return tuple(batch[:number]), {}
    raise TypeError(f"{where}: batch must be a tensor, a tuple or a mapping, got {type(batch).__name__}")


Shapes = dict[str, list[tuple[int, ...]]]
"""Name -> shapes of the inputs of a layer, each once."""


def example_run(where: str, model: nn.Module, example_inputs: Any, names: Iterable[str] = ()) -> tuple[Shapes, Calls]:
    """(shapes of the inputs that a forward pass on ``example_inputs`` gives the named layers, all calls that it makes). Layers that it does
    not call have no shapes. The model is not changed."""
    args, kwargs = split_inputs(where, example_inputs)
    layers = {name: model.get_submodule(name) for name in names}
    shapes: dict[nn.Module, dict[tuple[int, ...], None]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        found = shapes.setdefault(module, {})
        if isinstance(x, Tensor):
            found[tuple(x.shape)] = None

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers.values()]
    try:
        with untouched(model), evaluating(model), recording(model) as calls:
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: list(shapes[layer]) for name, layer in layers.items() if layer in shapes}, calls


def own_run(where: str, model: nn.Module) -> Calls | None:
    """The calls of a run on ``model.dummy_inputs``, which models of Hugging Face's transformers have. None without them, or where the model
    does not run on them: they are token ids, whatever the model takes."""
    inputs, parameter = getattr(model, "dummy_inputs", None), next(model.parameters(), None)
    if not isinstance(inputs, Mapping) or parameter is None:
        return None
    inputs = {name: value.to(parameter.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    try:
        return example_run(where, model, inputs)[1]
    except Exception:  # whatever a model may raise on inputs that are not made for it
        return None


def modules_of(model: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """All modules of a type by their first path."""
    return {paths[0]: module for module, paths in all_names(model).items() if isinstance(module, kind)}
