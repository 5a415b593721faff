"""The mask that makes a layer sparse while it trains: a parametrization of ``weight``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..nn.parametrized import remove_parametrizations
from .straight_through import sparse_refined


class Mask(nn.Module):
    """``weight = original where mask else 0``, as a parametrization of a layer's ``weight``.

    The optimizer keeps updating ``original`` (the same Parameter object as before), but whatever momentum or weight decay does to a
    pruned entry, the layer sees zero there, and the entry's gradient is exactly zero. The buffer ``mask`` (bool, the weight's shape)
    is part of the model's state_dict.

    ``decay`` None: as described. A number: straight-through, the gradient reaches every entry of ``original``, and pruned ones get
    ``decay * original`` added to theirs, which pulls them to zero (SR-STE, see ``straight_through.py``).

    >>> layer = nn.Linear(4, 2)
    >>> mask = add_mask(layer)
    >>> mask.mask[:, 0] = False      # layer.weight[:, 0] is now 0
    """

    mask: Tensor

    def __init__(self, like: Tensor, decay: float | None = None) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mask", torch.ones_like(like, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        if self.decay is not None:
            return sparse_refined(weight, self.mask, self.decay)
        # where, not a product: a NaN or infinite value under the mask, or in its gradient, cannot leak.
        return torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"shape={tuple(self.mask.shape)}, sparsity={1 - self.mask.float().mean().item():.3f}"


def add_mask(layer: nn.Module, decay: float | None = None) -> Mask:
    """Put an all-ones mask on ``layer.weight``, after whatever parametrizations it already has."""
    mask = Mask(weight_of(layer), decay)
    parametrize.register_parametrization(layer, "weight", mask)
    return mask


def weight_of(layer: nn.Module) -> Tensor:
    """The effective weight of a layer: after masks and other parametrizations."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def masks_of(layer: nn.Module) -> list[Mask]:
    """The masks on ``layer.weight``; empty for a layer that has none."""
    return [entry for entry in _chain(layer) or () if isinstance(entry, Mask)]


def stored_weight(layer: nn.Module) -> Tensor | None:
    """The Parameter that an optimizer updates for ``layer.weight``; None if several stand behind it, as with weight norm."""
    chain = _chain(layer)
    if chain is None:
        return weight_of(layer)
    return chain.original if chain.is_tensor else None


def _chain(layer: nn.Module) -> parametrize.ParametrizationList | None:
    """The parametrizations of ``layer.weight`` in the order they apply."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    chains = layer.parametrizations
    assert isinstance(chains, nn.ModuleDict)
    chain = chains["weight"]
    assert isinstance(chain, parametrize.ParametrizationList)
    return chain


@torch.no_grad()
def bake_mask(layer: nn.Module, mask: Mask) -> None:
    """Write the mask's zeros into the stored weight and take the mask away.

    Other parametrizations stay (fake quantization maps 0 to 0), except ones with several tensors behind the weight, such as weight
    norm: zeros cannot be written into those, so the weight becomes a plain Parameter.
    """
    chain, stored = _chain(layer), stored_weight(layer)
    assert chain is not None
    if len(chain) == 1 or stored is None:
        remove_parametrizations(layer, "weight")
        # The weight comes back behind the bias; optimizers number parameters by this order, so it must be what it was.
        rest = {name: layer._parameters.pop(name) for name in list(layer._parameters) if name != "weight"}
        layer._parameters.update(rest)
        return
    stored.copy_(mask(stored))
    del chain[next(i for i, entry in enumerate(chain) if entry is mask)]
