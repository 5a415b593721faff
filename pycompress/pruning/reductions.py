"""Statistics over channels that get fewer: noted in one run of a model, given again in a run of it with channels removed.

LayerNorm over 8 of 16 channels has another mean and variance than over all 16 with 8 zeros. Neither is wrong, but the difference would
drown what a rehearsal looks for. So the run with channels removed takes the statistics of the earlier run wherever it reduces over fewer
values than that one did; the values that they are applied to, their order and their places are its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Reduction = tuple[int, Any, Callable[[Any], Any]]
"""How many values each statistic is taken over, the statistics, and what makes a result out of such statistics."""


class Reductions(TorchFunctionMode):
    """Sees every call of torch inside a ``with`` block. ``calls`` of one block are the ``earlier`` of another."""

    def __init__(self, earlier: Sequence[tuple[Any, int, Any]] | None = None) -> None:
        super().__init__()
        self.calls: list[tuple[Any, int, Any]] = []
        self._earlier = earlier

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        if func not in _KNOWN:
            return result
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        reduction = _KNOWN[func](func, result, *args, **kwargs)
        if reduction is None:
            return result
        count, statistics, again = reduction
        self.calls.append((func, count, statistics))
        if self._earlier is None or len(self.calls) > len(self._earlier):
            return result
        known, fuller, full = self._earlier[len(self.calls) - 1]
        return again(full) if known is func and fuller > count else result


def _plain(func: Any, result: Any, x: Tensor, *_: Any, **__: Any) -> Reduction | None:
    """The mean, variance or maximum in a normalisation or attention written by hand: it has kept its dimensions, to be broadcast."""
    first = result if isinstance(result, Tensor) else result[0]
    if first.dim() != x.dim() or not first.numel():
        return None
    return x.numel() // first.numel(), result, lambda full: full


def _softmax(func: Any, result: Tensor, x: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Reduction | None:
    if dim is None:
        return None
    wide = x.to(result.dtype)

    def again(total: Tensor) -> Tensor:
        return wide - total if func in _LOG_SOFTMAX else (wide - total).exp()

    return x.shape[dim], wide.logsumexp(dim, keepdim=True), again


def _layer_norm(
    func: Any, result: Tensor, x: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Reduction:
    dims = tuple(range(-len(normalized_shape), 0))
    mean, scale = x.mean(dims, keepdim=True), (x.var(dims, unbiased=False, keepdim=True) + eps).rsqrt()
    return math.prod(normalized_shape), (mean, scale), lambda full: _affine((x - full[0]) * full[1], weight, bias)


def _rms_norm(
    func: Any, result: Tensor, x: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Reduction:
    dims = tuple(range(-len(normalized_shape), 0))
    scale = (x.square().mean(dims, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return math.prod(normalized_shape), scale, lambda full: _affine(x * full, weight, None)


def _group_norm(
    func: Any, result: Tensor, x: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Reduction:
    flat = x.reshape(x.shape[0], num_groups, -1)
    mean, scale = flat.mean(-1, keepdim=True), (flat.var(-1, unbiased=False, keepdim=True) + eps).rsqrt()

    def again(full: tuple[Tensor, Tensor]) -> Tensor:
        ones = (1,) * (x.dim() - 2)
        per_channel = [None if part is None else part.view(-1, *ones) for part in (weight, bias)]
        return _affine(((flat - full[0]) * full[1]).view_as(x), *per_channel)

    return flat.shape[-1], (mean, scale), again


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


_LOG_SOFTMAX = {torch.log_softmax, Tensor.log_softmax, F.log_softmax}
_KNOWN: dict[Any, Callable[..., Reduction | None]] = {
    **{getattr(owner, name): _plain for owner in (torch, Tensor) for name in ("mean", "var", "std", "max", "min", "amax", "amin")},
    **dict.fromkeys((torch.var_mean, torch.std_mean), _plain),
    **dict.fromkeys((torch.softmax, Tensor.softmax, F.softmax, *_LOG_SOFTMAX), _softmax),
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.rms_norm: _rms_norm,
}
