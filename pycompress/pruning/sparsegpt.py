"""SparseGPT: prune a weight and let the weights of the same row still to come make up for what it did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.inputs import check_model
from ..nn.input_moments import InputMoments, to_columns
from ..nn.surgery import Ignore, check_ignore, select
from ..progress import track
from .checks import check_plain, check_untied, check_weights, resolve_ratios
from .inputs import call_of, check_runs, inputs_of, modes_kept
from .patterns import NM, Pattern, parse_pattern

_WHERE = "sparsegpt"
_BLOCK = 128
"""Columns whose updates reach the later ones at once (section 3.3 of the paper), and whose weights share an unstructured budget."""


def sparsegpt(
    model: nn.Module,
    data: Iterable[Any],
    example_inputs: Any,
    *,
    pattern: str = "2:4",
    ratio: float | Mapping[str, float] | None = None,
    ignore: Ignore = (),
    damping: float = 0.01,
    progress: bool | None = None,
) -> nn.Module:
    """Prune the linear and convolution layers of a trained model at once, without training. In place, returns the model.

    A layer after the other, in the order in which the model calls them: from the inputs X that it gets out of the layers pruned
    before, H = X X^T, and column by column the weights with the least w^2 / [H^-1]_jj go, and the columns behind take over
    (Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1). The weights hold zeros then and nothing else: ``Pruner`` and
    ``prune`` with the same pattern keep exactly the others, for training or for packed layers.

    - ``data``: batches as for ``Pruner.calibrate``, held in memory and run once for every set of layers that read the same tensor
    - ``pattern``: ``"N:M"`` or ``"unstructured"``, with ``ratio`` and ``ignore`` as for ``Pruner``; unstructured budgets are met in
      every 128 columns
    - ``damping``: share of the mean diagonal that is added to H's

    Channel permutation goes first: ``permute_channels``, then ``sparsegpt``.

    Layers that ``data`` does not reach raise. The model runs in evaluation mode, modes stay. Deterministic. ``ValueError`` for wrong
    arguments, NaN or infinite weights or inputs, ties and parametrized weights; after any error, or an interruption, the model is as
    before.

    >>> model = prune(sparsegpt(model, loader, x, pattern="2:4"), x, pattern="2:4")
    """
    check_model(_WHERE, model)
    kind = parse_pattern(_WHERE, pattern)
    if kind is None:
        raise ValueError(f"{_WHERE}: pattern must be 'N:M' with numbers or 'unstructured', got {pattern!r}")
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping < 1:
        raise ValueError(f"{_WHERE}: damping must be in (0, 1), got {damping!r}")
    layers = select(model, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), check_ignore(_WHERE, model, ignore))
    ratios = resolve_ratios(_WHERE, ratio, kind, "local", layers)
    layers = {name: layer for name, layer in layers.items() if name in ratios}
    if not layers:
        raise ValueError(f"{_WHERE}: model must have a layer to prune that is not ignored, got none")
    check_weights(_WHERE, layers)
    check_plain(_WHERE, layers)
    check_untied(_WHERE, model, layers)
    check_runs(_WHERE, model, example_inputs)
    inputs = inputs_of(_WHERE, example_inputs)
    batches = [call_of(_WHERE, batch, inputs)[:2] for batch in data]
    if not batches:
        raise ValueError(f"{_WHERE}: data must yield at least one batch, got none")

    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    try:
        with torch.no_grad(), modes_kept(model):
            model.eval()
            stages = _stages(model, layers, batches)
            for stage in track(stages, "sparsegpt", progress=progress):
                for name, moments in _moments(model, {name: layers[name] for name in stage}, batches).items():
                    weight = layers[name].weight
                    groups = weight.double().reshape(len(moments.gram), -1, moments.gram.shape[1])
                    sizes = [group.numel() * i for i, group in enumerate(groups)]
                    parts = zip(groups, moments.gram, sizes, strict=True)
                    pruned = [_prune(w, h, kind, ratios[name], damping, done) for w, h, done in parts]
                    weight.copy_(torch.stack(pruned).view(weight.shape))
    except BaseException:
        with torch.no_grad():
            for name, weight in before.items():
                layers[name].weight.copy_(weight)
        raise
    return model


class _Enough(Exception):
    """Every layer of a stage has got its input; the rest of the forward pass is not needed."""


def _stages(model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Any]) -> list[list[str]]:
    """Names in the order of the calls; neighbours that read the same tensor (queries, keys and values) together."""
    stages: list[list[str]] = []
    again: set[str] = set()  # called more than once, perhaps on other tensors: such a layer stands alone
    seen: list[Tensor] = []  # held, so that no other tensor can get its address

    def hook(name: str) -> Any:
        def note(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            if any(name in stage for stage in stages):
                again.add(name)
                return
            if seen and seen[-1] is x:
                stages[-1].append(name)
            else:
                stages.append([name])
            seen.append(x)

        return note

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        for args, kwargs in batches:
            model(*args, **kwargs)
            if sum(map(len, stages)) == len(layers):
                break
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(layers.keys() - {name for stage in stages for name in stage})
    if missing:
        raise ValueError(f"{_WHERE}: data must reach every layer, it never reached {missing[0]!r}; put that in ignore")
    return [part for stage in stages for part in ([stage] if again.isdisjoint(stage) else [[name] for name in stage])]


def _moments(model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Any]) -> dict[str, InputMoments]:
    """Second moments of the inputs of one stage's layers. Layers of a stage share them where their shapes allow."""
    found: dict[str, InputMoments] = {}
    first = next(iter(layers))
    alike = all(isinstance(layer, nn.Linear) for layer in layers.values())  # the same columns for all of them
    listening = {first: layers[first]} if alike else layers
    # A layer that is called again in the same pass is still to be heard.
    calls = dict.fromkeys(listening, 0)
    expected: dict[str, int] = {}

    def hook(name: str) -> Any:
        def collect(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            columns = to_columns(layer, args[0] if args else kwargs["input"])
            if name not in found:
                groups, k, _ = columns.shape
                zeros = columns.new_zeros(groups, k, dtype=torch.float64)
                found[name] = InputMoments(zeros.new_zeros(groups, k, k), zeros)
            if columns.shape[:2] != found[name].mean.shape:
                return  # the layer is about to say so
            found[name].add(columns)
            calls[name] += 1
            if expected and calls == expected:
                raise _Enough

        return collect

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in listening.items()]
    try:
        for number, (args, kwargs) in enumerate(batches):
            calls.update(dict.fromkeys(calls, 0))
            try:
                model(*args, **kwargs)
            except _Enough:
                continue
            if number == 0:
                expected.update(calls)
    finally:
        for handle in handles:
            handle.remove()
    for name, moments in found.items():
        if not torch.isfinite(moments.gram).all():
            raise ValueError(f"{_WHERE}: input of layer {name!r} must be finite, got NaN or Inf")
    return dict.fromkeys(layers, found[first]) if alike else found


def _prune(weight: Tensor, hessian: Tensor, pattern: Pattern, ratio: float, damping: float, done: int = 0) -> Tensor:
    """One group: weight (rows, K) and Hessian (K, K), float64 -> the pruned weight. ``done``: weights of the layer's groups before."""
    rows, columns = weight.shape
    mean = hessian.diagonal().mean()
    eye = torch.eye(columns, dtype=hessian.dtype, device=hessian.device)
    hessian = eye if mean == 0 else hessian + damping * mean * eye
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    weight = weight.clone()
    block = _BLOCK if not isinstance(pattern, NM) else max(_BLOCK // pattern.m, 1) * pattern.m
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, u = weight[:, start:stop], upper[start:stop, start:stop]
        keep = torch.ones_like(part, dtype=torch.bool)
        if not isinstance(pattern, NM):
            budget = round(ratio * (done + rows * stop)) - round(ratio * (done + rows * start))
            scores = (part / u.diagonal()).square().flatten()
            keep.view(-1)[torch.sort(scores, stable=True).indices[:budget]] = False
        errors = torch.empty_like(part)
        for j in range(stop - start):
            if isinstance(pattern, NM) and j % pattern.m == 0:
                group = slice(j, min(j + pattern.m, stop - start))
                scores = (part[:, group] / u.diagonal()[group]).square()
                least = torch.sort(scores, dim=1, stable=True).indices[:, : max(0, scores.shape[1] - pattern.n)]
                keep[:, group] = keep[:, group].scatter(1, least, False)
            errors[:, j] = part[:, j].masked_fill(keep[:, j], 0.0) / u[j, j]
            part[:, j].masked_fill_(~keep[:, j], 0.0)
            part[:, j + 1 :] -= errors[:, j, None] * u[j, j + 1 :]
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight
