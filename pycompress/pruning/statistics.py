"""What data tells about layers: activation norms and gradients, gathered by hooks while the model trains or is calibrated.

Requirements:
- gathers from the user's own training loop, without extra passes: that is what makes ``train(batch); pruner.step()`` enough;
- never from evaluation: outside calibration only layers in train mode are listened to;
- only from the model itself: deepcopy copies hooks along;
- no synchronisation with a GPU in the training loop;
- after each pruning event older batches count half, because the weights they were seen with have moved;
- the same numbers on every rank of a distributed job, so that all ranks prune the same weights;
- state that can be saved and loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from .criteria import Evidence
from .mask import stored_weight, weight_of

_KINDS = ("input_squares", "input_rows", "gradient", "squared_gradient", "gradient_batches")


class Statistics:
    """Running sums per layer. ``needs``: ``"activations"``, ``"gradients"``, both or nothing."""

    def __init__(self, layers: Mapping[str, nn.Module], needs: frozenset[str]) -> None:
        self.layers = dict(layers)
        self.needs = needs
        self.sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
        self._handles: list[RemovableHandle] = []
        self.calibrating = False

    def attach(self) -> None:
        """Listen to forward passes and to gradients of weights that require them."""
        self.detach()
        for name, layer in self.layers.items():
            if "activations" in self.needs:
                self._handles.append(layer.register_forward_pre_hook(self._on_input(name), with_kwargs=True))
            stored = stored_weight(layer)
            if "gradients" in self.needs and stored is not None and stored.requires_grad:
                self._handles.append(stored.register_hook(self._on_gradient(name)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def calibration(self) -> Iterator[None]:
        """Listen to layers in eval mode too, and leave the gradients to ``add_gradients``."""
        self.calibrating = True
        try:
            yield
        finally:
            self.calibrating = False

    def clear(self) -> None:
        for table in self.sums.values():
            table.clear()

    def fade(self) -> None:
        """Let everything seen so far count half."""
        for table in self.sums.values():
            for value in table.values():
                value.mul_(0.5)

    def add_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Take one batch's gradients of the stored weights. One with a non-finite value is left out (mixed precision overflows)."""
        for name, gradient in gradients.items():
            value = gradient.detach().float()
            fine = torch.isfinite(value).all()
            value = torch.where(fine, value, torch.zeros((), device=value.device))
            self._add("gradient", name, value)
            self._add("squared_gradient", name, value.square())
            self._add("gradient_batches", name, fine.float())

    def evidence(self, where: str, name: str, generator: torch.Generator) -> Evidence:
        """What a criterion gets to see of one layer. ``RuntimeError`` if it needs data and none came."""
        layer = self.layers[name]
        gradient = squared_gradient = input_norm = None
        if "activations" in self.needs:
            rows = self._total("input_rows", name)
            squares = self._total("input_squares", name)
            if rows is None or squares is None or rows == 0:
                raise RuntimeError(
                    f"{where}: the criterion needs activations and layer {name!r} has seen none. Call pruner.calibrate(data) or run the "
                    "model on data first; a layer that the forward pass never calls belongs in ignore"
                )
            input_norm = (squares / rows).sqrt().float()
        if "gradients" in self.needs:
            batches = self._total("gradient_batches", name)
            total, squared = self._total("gradient", name), self._total("squared_gradient", name)
            if batches is None or total is None or squared is None or batches == 0:
                raise RuntimeError(
                    f"{where}: the criterion needs gradients and layer {name!r} has seen none. Call pruner.calibrate(data, loss_fn) or "
                    "run loss.backward() first; a layer that the loss does not depend on belongs in ignore"
                )
            gradient, squared_gradient = (total / batches).float(), (squared / batches).float()
        weight = weight_of(layer).detach().float()
        return Evidence(name, layer, weight, generator, gradient, squared_gradient, input_norm)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {kind: {name: value.clone() for name, value in table.items()} for kind, table in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.clear()
        for kind, table in state.items():
            for name, value in table.items():
                device = "cpu" if kind == "input_rows" else weight_of(self.layers[name]).device
                self.sums[kind][name] = value.to(device, copy=True)

    def _add(self, kind: str, name: str, value: Tensor) -> None:
        table = self.sums[kind]
        table[name] = table[name] + value if name in table else value.clone()

    def _total(self, kind: str, name: str) -> Tensor | None:
        """The sum, added up over all ranks; None if nothing was seen. A layer seen on one rank only counts on all."""
        value = self.sums[kind].get(name)
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return value
        layer = self.layers[name]
        weight = weight_of(layer)
        shape = {"input_squares": (_input_features(layer),), "input_rows": (), "gradient_batches": ()}.get(kind, weight.shape)
        total = torch.zeros(shape, device=weight.device)
        if value is not None:
            total += value
        dist.all_reduce(total)
        return total

    def _on_input(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not (layer.training or self.calibrating) or not self._is_ours(name, layer):
                return
            x = args[0] if args else kwargs["input"]
            axis = -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1
            features = x.detach().movedim(axis, -1).reshape(-1, x.shape[axis])
            self._add("input_squares", name, features.float().square().sum(0))
            self._add("input_rows", name, torch.tensor(float(features.shape[0]), dtype=torch.float64))

        return hook

    def _is_ours(self, name: str, layer: nn.Module) -> bool:
        """A copy of the model (an average of its weights, a teacher) has our hooks, too, but is another model. Replicas are not."""
        return layer is self.layers[name] or getattr(layer, "_is_replica", False)  # nn.DataParallel

    def _on_gradient(self, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if not self.calibrating:  # calibration hands its gradients over itself
                self.add_gradients({name: gradient})

        return hook


def _input_features(layer: nn.Module) -> int:
    assert isinstance(layer, (nn.Linear, _ConvNd))
    return layer.in_channels if isinstance(layer, _ConvNd) else layer.in_features
