"""``Pruner``: prune while you train; ``prune``: prune in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.inputs import check_model
from ..nn.surgery import Ignore, check_ignore, select
from ..progress import track
from .channels import ChannelRemoval
from .checks import check_called, check_plain, check_positive, check_training, check_untied, check_weights, resolve_ratios
from .criteria import CRITERIA, SCORABLE, Criterion, Evidence
from .inputs import call_of, check_runs, inputs_of, modes_kept
from .mask import stored_weight
from .masking import Masking
from .patterns import NM, parse_pattern
from .permutation import permute_channels
from .schedules import SCHEDULES, Schedule, check_schedule, share_at
from .statistics import Statistics
from .summary import PruningSummary
from .unseen import by_reason, unseen

_WHERE = "Pruner"


@dataclass(frozen=True)
class PruningStep:
    """What one call of ``Pruner.step`` did."""

    event: int
    """Pruning events so far."""
    pruned: bool
    """Whether this call was an event."""
    structure_changed: bool
    """Whether layers got new, smaller Parameters: then build a new optimizer."""
    sparsity: float
    """Share of the prunable weights that is gone."""
    done: bool
    """Whether the final ratio is reached."""


class Pruner:
    """Removes weights or channels from a model while it trains.

    - ``model``: changed in place. Mask patterns put a ``Mask`` parametrization on ``weight``, so make the pruner before a DDP wrapper.
    - ``example_inputs``: a tensor, a tuple of positional or a dict of keyword arguments the model can be called with.
    - ``pattern``: ``"unstructured"``; ``"N:M"`` with numbers, such as ``"2:4"``: at most N nonzero in M neighbours along the input;
      ``"channel"``: channels are physically removed.
    - ``ratio``: share that is removed at the end, in [0, 1): of weights, or of channels. A dict gives layers (by name or pattern, as
      in ``ignore``) ratios of their own and leaves the others. Not needed for N:M.
    - ``criterion``: a name in ``CRITERIA`` or a ``Criterion``; the lowest scores go.
    - ``scope``: ``"local"`` meets the ratio in each layer, ``"global"`` over all layers together.
    - ``schedule``: a name in ``SCHEDULES`` or a function progress -> share of the ratio; ``steps``: pruning events until the ratio is
      reached; ``frequency``: calls of ``step`` per event.
    - ``ignore``: names, patterns, types or modules that keep their weights. With channels, an ignored layer keeps its outputs; it
      still loses the inputs that its predecessors no longer produce.
    - ``round_to``: channels only; layer widths are rounded up to a multiple.
    - ``training``: of masks. ``"masked"``: a pruned weight gets no gradient and stays pruned. ``"sr-ste"`` (Zhou et al. 2021, arXiv
      2102.04010): gradients reach all weights, every ``frequency``-th ``step`` chooses the mask anew, also after ``steps`` events, so
      weights come back; ``sparse_decay`` (default 2e-4, 0: plain straight-through) pulls the pruned ones to zero.
    - ``permute``: N:M only; channels are reordered first so that the pattern keeps more magnitude, see ``permute_channels``. What it
      did is in ``permutation``. The order is part of the weights: a resumed run gets it from the model's state_dict.
    - ``seed``: of the ``random`` criterion.

    Nothing is changed if an argument is wrong. What is pruned stays pruned, except with ``training="sr-ste"``.

    >>> pruner = Pruner(model, x, pattern="2:4", steps=10)
    >>> for batch in data: train(batch); pruner.step()
    >>> model = pruner.convert()
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        pattern: str = "unstructured",
        ratio: float | Mapping[str, float] | None = None,
        criterion: str | Criterion = "magnitude",
        scope: str = "local",
        schedule: str | Schedule = "cubic",
        steps: int = 1,
        frequency: int = 1,
        ignore: Ignore = (),
        round_to: int | None = None,
        training: str = "masked",
        sparse_decay: float | None = None,
        permute: bool = False,
        seed: int = 0,
    ) -> None:
        # Check everything, then touch the model.
        check_model(_WHERE, model)
        kind = parse_pattern(_WHERE, pattern)
        self.criterion = _criterion(criterion, pattern)
        self.steps = check_positive(_WHERE, "steps", steps)
        self._schedule = schedule if callable(schedule) else SCHEDULES[schedule]
        check_schedule(_WHERE, self._schedule, self.steps)
        self.frequency = check_positive(_WHERE, "frequency", frequency)
        if scope not in ("local", "global"):
            raise ValueError(f"{_WHERE}: scope must be 'local' or 'global', got {scope!r}")
        if round_to is not None:
            check_positive(_WHERE, "round_to", round_to)
            if kind is not None:
                raise ValueError(f"{_WHERE}: round_to must be left out with pattern {pattern!r}, it is for pattern 'channel'")
        decay = check_training(_WHERE, training, sparse_decay, pattern)
        if not isinstance(permute, bool) or (permute and not isinstance(kind, NM)):
            raise ValueError(f"{_WHERE}: permute must be True or False, and False but for N:M patterns, got {permute!r} with {pattern!r}")
        entries = check_ignore(_WHERE, model, ignore)
        supported = SCORABLE if kind is None else kind.types
        layers = select(model, supported, entries)
        if not layers:
            names = ", ".join(sorted(layer.__name__.strip("_") for layer in supported))
            reasons = "".join(f"; {line}" for line in by_reason(unseen(model, entries)))
            raise ValueError(f"{_WHERE}: model must have a layer to prune that is not ignored ({names}), got none{reasons}")
        ratios = resolve_ratios(_WHERE, ratio, kind, scope, layers)
        everything = select(model, SCORABLE)
        check_weights(_WHERE, everything if kind is None else layers)
        check_runs(_WHERE, model, example_inputs)
        self._inputs = inputs_of(_WHERE, example_inputs)
        self._generator = torch.Generator().manual_seed(seed)
        self._engine: Masking | ChannelRemoval
        if kind is None:
            check_plain(_WHERE, everything)
            ignored = [name for name in everything if name not in layers]
            self._engine = ChannelRemoval(model, example_inputs, ratios, ignored, scope, round_to or 1)
            for name in ratio if isinstance(ratio, Mapping) else ():
                if name in self._engine.fixed:
                    raise ValueError(f"{_WHERE}: ratio names {name!r}, but {self._engine.fixed[name]}")
            self._statistics = Statistics(self._engine.layers, self.criterion.needs)
            if not self.criterion.needs:
                spare = torch.Generator().manual_seed(seed)
                self._engine.check_scores(self.criterion, lambda name: self._statistics.evidence(_WHERE, name, spare))
        else:
            layers = {name: layer for name, layer in layers.items() if name in ratios}
            check_untied(_WHERE, model, layers)
            check_called(_WHERE, model, layers, self.criterion.needs)
            others = {} if isinstance(ratio, Mapping) else unseen(model, entries)  # a dict says itself that it leaves the rest
            self._engine = Masking(layers, kind, ratios, scope, decay, others)
            self._statistics = Statistics(layers, self.criterion.needs)
        self.permutation = permute_channels(model, example_inputs, pattern=pattern, ignore=entries) if permute else None
        self._engine.attach(model)
        self._statistics.attach()
        self.model = model
        self._anew = decay is not None
        self.event = 0
        self._calls = 0
        self._sparsity = 0.0
        self._final_summary: PruningSummary | None = None
        self._config = {
            "pattern": pattern,
            "criterion": criterion if isinstance(criterion, str) else type(criterion).__name__,
            "schedule": schedule if isinstance(schedule, str) else getattr(schedule, "__name__", type(schedule).__name__),
            "scope": scope,
            "steps": steps,
            "frequency": frequency,
            "round_to": round_to,
            "training": training,
            "sparse_decay": decay,
            "permute": permute,
            "ratios": ratios,
        }

    @property
    def done(self) -> bool:
        """Whether all pruning events have happened."""
        return self.event >= self.steps

    def prunable(self) -> list[str]:
        """Names of the layers that a ``ratio`` dict can name; with channels one for each set of layers that share them."""
        return list(self._engine.ratios)

    def calibrate(self, data: Iterable[Any], loss_fn: Callable[..., Tensor] | None = None, *, progress: bool | None = None) -> None:
        """Show data to a criterion that needs it. Replaces what was seen before; parameters, buffers and ``.grad`` stay as they are.

        A batch is a tensor, a tuple that starts with the model's inputs, or a dict; what follows the inputs is handed to
        ``loss_fn(output, *targets)``, which returns a scalar. Runs in eval mode. Criteria that need no data ignore the call, those
        that need activations only ignore ``loss_fn``.

        Without this call the statistics come from the training loop itself: every forward pass of a layer in train mode, every
        ``backward()``.
        """
        self._check_open("calibrate")
        needs = self.criterion.needs
        if not needs:
            return
        if "gradients" in needs and loss_fn is None:
            raise ValueError(f"Pruner.calibrate: loss_fn must be given, the criterion {self._config['criterion']!r} needs gradients")
        before = self._statistics.state_dict()
        self._statistics.clear()
        batches = 0
        try:
            with modes_kept(self.model), self._statistics.calibration():
                self.model.eval()
                for batch in track(data, "calibrate", progress=progress):
                    args, kwargs, targets = call_of("Pruner.calibrate", batch, self._inputs)
                    if "gradients" in needs:
                        assert loss_fn is not None
                        self._statistics.add_gradients(self._gradients(lambda: loss_fn(self.model(*args, **kwargs), *targets)))  # noqa: B023
                    else:
                        with torch.no_grad():
                            self.model(*args, **kwargs)
                    batches += 1
            if batches == 0:
                raise ValueError("Pruner.calibrate: data must yield at least one batch, got none")
        except BaseException:
            self._statistics.load_state_dict(before)
            raise

    def step(self) -> PruningStep:
        """Call after every training step. Every ``frequency``-th call prunes a little more, until ``steps`` events have happened; with
        ``training="sr-ste"`` it goes on choosing masks after that.

        With ``pattern="channel"`` an event replaces Parameters by smaller ones: build a new optimizer (and DDP wrapper) whenever
        ``structure_changed`` is true.
        """
        self._check_open("step")
        due = (self._anew or not self.done) and (self._calls + 1) % self.frequency == 0
        changed = False
        if due:
            share = share_at("Pruner.step", self._schedule, min(1.0, (self.event + 1) / self.steps))
            changed = self._engine.prune(self.criterion, self._evidence, share)
            self.event += 1
            self._sparsity = self._engine.summary().sparsity
            if changed:  # other shapes: what was seen no longer fits, and the hooks hang on Parameters that are gone
                self._statistics.clear()
                self._statistics.attach()
            else:
                self._statistics.fade()
        self._calls += 1
        return PruningStep(self.event, due, changed, self._sparsity, self.done)

    def convert(self, *, allow_partial: bool = False) -> nn.Module:
        """Make the pruning permanent and return the model: zeros in plain weights (packed layers where there is a factory), no hooks.

        ``RuntimeError`` if pruning events are missing, unless ``allow_partial``.
        """
        self._check_open("convert")
        if not self.done and not allow_partial:
            raise RuntimeError(
                f"Pruner.convert: only {self.event} of {self.steps} pruning steps were made; call step() more often, lower frequency "
                f"(now {self.frequency}), or pass allow_partial=True"
            )
        self._final_summary = self._engine.summary()
        self._statistics.detach()
        self.model = self._engine.convert(self.model)
        return self.model

    def summary(self) -> PruningSummary:
        """Sparsity per layer and in total, also after ``convert``."""
        return self._final_summary or self._engine.summary()

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and tensors with which ``load_state_dict`` goes on exactly here.

        Save it beside the model's and the optimizer's; ``torch.load(..., weights_only=True)`` can read it.
        """
        self._check_open("state_dict")
        return {
            "config": dict(self._config),
            "event": self.event,
            "calls": self._calls,
            "sparsity": self._sparsity,
            "generator": self._generator.get_state(),
            "statistics": self._statistics.state_dict(),
            "removed": self._engine.plain_history(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume: make the same pruner on a model as it was at the start, call this, then load model and optimizer.

        With channels this makes the same removals again, so that the model's state_dict fits; masks come with the model's.
        """
        self._check_open("load_state_dict")
        missing = [key for key in ("config", "event", "calls", "generator", "statistics", "removed") if key not in state]
        if missing:
            raise ValueError(f"Pruner.load_state_dict: state must be what state_dict() returns, got one without {missing[0]!r}")
        for key, value in self._config.items():
            saved = state["config"].get(key)
            if saved != value:
                raise ValueError(f"Pruner.load_state_dict: {key} must be as in the saved pruner, {saved!r}, got {value!r}")
        unknown = {name for table in state["statistics"].values() for name in table} - set(self._statistics.layers)
        if unknown:
            raise ValueError(
                f"Pruner.load_state_dict: state must fit the model, got statistics of {min(unknown)!r}, which is not pruned here"
            )
        if isinstance(self._engine, ChannelRemoval):
            if self._engine.history:
                raise RuntimeError("Pruner.load_state_dict: a pruner that has not removed channels yet is needed")
            self._engine.replay(state["removed"])
            self._statistics.attach()
        self._statistics.load_state_dict(state["statistics"])
        self._generator.set_state(state["generator"])
        self.event, self._calls, self._sparsity = state["event"], state["calls"], state["sparsity"]

    def undo(self) -> None:
        """Give up: take masks and hooks away. Weights keep their values; removed channels do not come back."""
        self._check_open("undo")
        self._final_summary = self._engine.summary()
        self._statistics.detach()
        self._engine.undo()

    def _evidence(self, name: str) -> Evidence:
        return self._statistics.evidence("Pruner.step", name, self._generator)

    def _gradients(self, compute: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Gradients of the stored weights for one batch, without touching ``.grad``; frozen weights get one too."""
        stored = {name: stored_weight(layer) for name, layer in self._statistics.layers.items()}
        weights = {name: weight for name, weight in stored.items() if weight is not None}
        frozen = [weight for weight in weights.values() if not weight.requires_grad]
        try:
            for weight in frozen:
                weight.requires_grad_(True)
            with torch.enable_grad():
                loss = compute()
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    shown = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                    raise ValueError(f"Pruner.calibrate: loss_fn must return a scalar tensor, got {shown}")
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        finally:
            for weight in frozen:
                weight.requires_grad_(False)
        return {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}

    def _check_open(self, method: str) -> None:
        if self._final_summary is not None:
            raise RuntimeError(f"Pruner.{method}: the pruner has finished, make a new one to prune further")


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    pattern: str = "unstructured",
    ratio: float | Mapping[str, float] | None = None,
    criterion: str | Criterion = "magnitude",
    scope: str = "local",
    ignore: Ignore = (),
    round_to: int | None = None,
    permute: bool = False,
    seed: int = 0,
    data: Iterable[Any] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Prune a model at once, in place, and return it. Arguments as for ``Pruner``; ``data`` and ``loss_fn`` as for ``calibrate``.

    >>> model = prune(model, x, pattern="channel", ratio=0.5, ignore=["head"])
    >>> model = prune(model, x, pattern="2:4", criterion="wanda", data=loader)
    """
    if data is None and _criterion(criterion, pattern).needs:
        raise ValueError(f"prune: data must be given, the criterion {criterion!r} learns from it")
    pruner = Pruner(
        model,
        example_inputs,
        pattern=pattern,
        ratio=ratio,
        criterion=criterion,
        scope=scope,
        ignore=ignore,
        round_to=round_to,
        permute=permute,
        seed=seed,
    )
    try:
        if data is not None:
            pruner.calibrate(data, loss_fn, progress=progress)
        pruner.step()
    except BaseException:
        pruner.undo()
        raise
    return pruner.convert()


def _criterion(criterion: str | Criterion, pattern: str) -> Criterion:
    found = criterion if isinstance(criterion, Criterion) else CRITERIA[criterion]()
    if found.channels_only and pattern != "channel":
        raise ValueError(f"{_WHERE}: criterion {type(found).__name__} ranks whole channels, so pattern must be 'channel', got {pattern!r}")
    return found
