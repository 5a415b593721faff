"""Cuts are tried on a copy before the model is touched: it has to run, to keep its output shapes, and to compute the right thing.

The right thing is what the uncut copy computes with zeros in exactly the weights that are cut away. A permutation, or a reshape into
attention heads, keeps all shapes, but afterwards other channels are read than the ones that were left.

Requirements:
- the answer does not depend on what the model has learned so far: both copies get the same random weights, since branches that start at
  zero, or attention that does not attend yet, would hide an error;
- normalisations over the removed channels are no error, though their statistics change: see ``reductions.py``;
- no second copy of weights that a cut leaves alone.
"""

from __future__ import annotations

from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..analysis.inputs import split_inputs
from .graph import Cuts, apply_cuts, part_named
from .inputs import tensors_in
from .reductions import Reductions


class MixedChannels(RuntimeError):
    """The cut model runs, but computes something else than the model with zeros in place of what is cut away."""


class Rehearsal:
    """A model's copy on which cuts are tried. Calls of it raise what the cut model raises, ``RuntimeError`` if outputs change their shape,
    or ``MixedChannels``."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self._args, self._kwargs = split_inputs("Pruner", example_inputs)
        self._stage = deepcopy(model).eval()
        _scatter(self._stage)
        if not self._is_usable():
            self._stage = deepcopy(model).eval()

    def __call__(self, cuts: Cuts) -> None:
        masked, cut = _copy_of_structure(self._stage), _copy_of_structure(self._stage)
        _zero(masked, cuts)
        apply_cuts(cut, cuts)
        with Reductions() as whole:
            expected = self._run(masked)
        with Reductions(whole.calls):
            got = self._run(cut)
        before, after = [tuple(tensor.shape) for tensor in expected], [tuple(tensor.shape) for tensor in got]
        if before != after:
            raise RuntimeError(f"output shapes change from {before} to {after}")
        if not all(_same(a, b) for a, b in zip(expected, got, strict=True)):
            raise MixedChannels(
                "removing channels gives other results than zeroing them: a permutation, or a reshape such as the one into attention "
                "heads, ties them to their places"
            )

    def _is_usable(self) -> bool:
        """Whether the model runs with random weights: not one that takes the logarithm of a parameter, or checks it."""
        try:
            outputs = self._run(self._stage)
        except Exception:  # whatever it raises: it is rehearsed with its own weights then
            return False
        return all(bool(torch.isfinite(tensor).any()) for tensor in outputs if tensor.numel())

    def _run(self, model: nn.Module) -> list[Tensor]:
        devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the other devices, too
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(0)
            return tensors_in(model(*self._args, **self._kwargs))


def rehearse(model: nn.Module, cuts: Cuts, example_inputs: Any) -> None:
    """One rehearsal; make a ``Rehearsal`` for several."""
    Rehearsal(model, example_inputs)(cuts)


@torch.no_grad()
def _scatter(model: nn.Module) -> None:
    """Random weights that keep activations in the order of 1, so that every channel counts and no nonlinearity hides it."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() > 1:
            value = torch.randn(parameter.shape, generator=generator) * (parameter.shape[0] / max(1, parameter.numel())) ** 0.5
        elif name.endswith("bias"):
            value = torch.randn(parameter.shape, generator=generator) / 2
        else:  # scales
            value = torch.rand(parameter.shape, generator=generator) + 0.5
        parameter.copy_(value)
    for norm in model.modules():
        if isinstance(norm, _NormBase) and norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator) / 2)
            norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)


def _copy_of_structure(model: nn.Module) -> nn.Module:
    """A model of its own around the same tensors. Cutting and zeroing give it others, and never write into these."""
    return deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


@torch.no_grad()
def _zero(model: nn.Module, cuts: Cuts) -> None:
    """Zeros in exactly those entries of parameters that ``cuts`` takes away; the parameters become other ones."""
    sides: dict[str, Cuts] = {}
    for (name, side), cut in cuts.items():
        sides.setdefault(name, {})[side] = cut  # type: ignore[index]
    for name, own in sides.items():
        target = part_named(model, name)
        holder, key = (_Holder(target), "target") if isinstance(target, nn.Parameter) else (deepcopy(target).double(), "")
        # Entries are numbered and then cut: the numbers that are missing afterwards are the ones to zero, whatever the layer's layout.
        for parameter in holder.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape))
        apply_cuts(holder, {(key, side): cut for side, cut in own.items()})  # type: ignore[misc]
        left = dict(holder.named_parameters())
        full = {"target": target} if isinstance(target, nn.Parameter) else dict(target.named_parameters())
        for part, parameter in full.items():
            if left[part].shape == parameter.shape:
                continue
            zeroed = torch.zeros_like(parameter).view(-1)
            kept = left[part].flatten().long()
            zeroed[kept] = parameter.flatten()[kept]
            path = name if isinstance(target, nn.Parameter) else f"{name}.{part}".strip(".")
            owner, _, last = path.rpartition(".")
            setattr(model.get_submodule(owner), last, nn.Parameter(zeroed.view(parameter.shape), parameter.requires_grad))


class _Holder(nn.Module):
    """A free parameter's size in a module, so that it can be cut like one."""

    def __init__(self, like: nn.Parameter) -> None:
        super().__init__()
        self.target = nn.Parameter(torch.empty(like.shape, dtype=torch.float64, device=like.device))


def _same(expected: Tensor, got: Tensor) -> bool:
    """Whether two outputs differ by rounding only, where they are finite. Whole numbers (an argmax) may flip by rounding: not compared."""
    if not expected.is_floating_point():
        return True
    # Another order of summation changes float32 by 1e-6, wrong channels by 1e-1 (as in permutation.py); float16 has 10 bits, bfloat16 8.
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(got)):
        return False
    expected, got = expected[finite].double(), got[finite].double()
    return bool((expected - got).norm() <= tolerance * expected.norm())
