"""Channel removal: the network gets physically smaller and stays an ordinary dense network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.base import set_note
from .checks import tied
from .criteria import SCORABLE, Criterion, EvidenceOf
from .graph import ChannelGraph, Cuts, Group, apply_cuts, cuts_of, merge_cuts, part_named, plain_cuts
from .mask import weight_of
from .ranking import lowest
from .rehearsal import MixedChannels, Rehearsal, rehearse
from .summary import LayerSparsity, PruningSummary
from .unseen import by_reason, untraceable

_DRAWS = 2
"""Rehearsals before training. One choice of channels may fit by accident: whole heads, or a set that a permutation maps to itself."""


class ChannelRemoval:
    """Removes the lowest-scored channels of every group of layers that share them.

    ``ratios``: layer name -> share of its output channels that is removed at the end; layers without an entry keep theirs.
    ``round_to``: what stays is rounded up to a multiple of it. With ``scope="global"`` the budget is a share of all channels, and a
    group's scores are divided by their mean, which makes groups comparable. Every layer keeps at least one channel.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        ratios: Mapping[str, float],
        protected: Sequence[str],
        scope: str,
        round_to: int,
    ) -> None:
        self.model = model
        self.example_inputs = example_inputs
        self.scope = scope
        self.round_to = round_to
        self.history: list[Cuts] = []
        graph = _trace(model, example_inputs)
        tied_modules = tied(model)
        self.ratios: dict[str, float] = {}
        self.initial: dict[str, int] = {}
        self.fixed: dict[str, str] = {}
        for group in graph.groups:
            ratio = _group_ratio(group, ratios)
            shared = next((member.name for member in group.members if member.name in tied_modules), None)
            fixed = group.fixed or (f"{shared!r} shares its parameters with another layer" if shared is not None else None)
            if fixed is not None:
                self.fixed.update(dict.fromkeys(group.outputs(), fixed))
            elif ratio is not None and not set(group.outputs()) & set(protected):
                self.ratios[group.root], self.initial[group.root] = ratio, group.channels
        # The last event is rehearsed now, whichever channels it will remove: a model that cannot be cut is told so before it trains.
        rehearsal = Rehearsal(model, example_inputs)
        for draw in range(_DRAWS):
            self._leave_out_mixed(graph, rehearsal, torch.Generator().manual_seed(draw))
        groups = self._groups(graph)
        if not groups:
            reasons = "; ".join(by_reason(self.fixed)) or "all are ignored or have no ratio"
            raise ValueError(f"Pruner: the model must have a layer whose channels can be removed, got none ({reasons})")
        modules = dict(model.named_modules())
        touched = {member.name for group in groups for member in group.members}
        self.layers = {name: layer for name, layer in modules.items() if name in touched and isinstance(layer, SCORABLE)}
        self._shapes = {name: tuple(weight_of(layer).shape) for name, layer in self.layers.items()}

    def attach(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for name, reason in self.fixed.items():
            if name in modules:
                set_note(modules[name], f"keeps its channels: {reason}")

    def check_scores(self, criterion: Criterion, evidence_of: EvidenceOf) -> None:
        """Raise if some group cannot be scored."""
        for group in self._groups(_trace(self.model, self.example_inputs)):
            self._scores(group, criterion, evidence_of)

    def prune(self, criterion: Criterion, evidence_of: EvidenceOf, share: float) -> bool:
        """Remove channels until ``share`` of the final number is gone. Returns whether any layer changed its shape."""
        graph = _trace(self.model, self.example_inputs)
        groups = self._groups(graph)
        scores = {group: self._scores(group, criterion, evidence_of) for group in groups}
        if self.scope == "global":
            surplus = self._global_surplus(scores, share)
        else:
            surplus = {group: self._surplus(group, share) for group in groups}
        channels = {group: self._choose(group, scores[group], surplus[group]) for group in groups}
        cuts = self._rehearsed(graph, channels, Rehearsal(self.model, self.example_inputs))
        if cuts:
            apply_cuts(self.model, cuts)
            self.history.append(cuts)
        return bool(cuts)

    def replay(self, history: Sequence[Any]) -> None:
        """Make the removals of an interrupted run again, on a model of the original structure."""
        try:
            events = [cuts_of(plain) for plain in history]
            twin = deepcopy(self.model)
            for cuts in events:
                rehearse(twin, cuts, self.example_inputs)
                apply_cuts(twin, cuts)
        except Exception as error:
            raise ValueError(f"Pruner.load_state_dict: state must fit the model, got {type(error).__name__}: {error}") from error
        for cuts in events:
            apply_cuts(self.model, cuts)
            self.history.append(cuts)

    def plain_history(self) -> list[Any]:
        return [plain_cuts(cuts) for cuts in self.history]

    def summary(self) -> PruningSummary:
        rows = [
            LayerSparsity(name, type(layer).__name__, self._shapes[name], tuple(weight_of(layer).shape), weight_of(layer).numel())
            for name, layer in self.layers.items()
        ]
        return PruningSummary("channel", tuple(rows))

    def convert(self, model: nn.Module) -> nn.Module:
        """Nothing left to do: the channels are gone."""
        return model

    def undo(self) -> None:
        """Nothing to take back: an event that fails changes nothing."""

    def _groups(self, graph: ChannelGraph) -> list[Group]:
        return [group for group in graph.groups if group.root in self.initial]

    def _scores(self, group: Group, criterion: Criterion, evidence_of: EvidenceOf) -> Tensor:
        """Score of each channel: what the criterion says of every layer that loses it, added up. float64, on the CPU."""
        total = torch.zeros(group.channels, dtype=torch.float64)
        silent = True
        for member in group.members:
            module = part_named(self.model, member.name)
            if not isinstance(module, nn.Module):  # a free parameter, such as a position embedding
                continue
            evidence = evidence_of(member.name) if member.name in self.layers else None
            scores = criterion.channel_scores(module, member.side, evidence)
            if scores is not None:
                total.index_add_(0, torch.tensor(member.roots), scores.double().cpu()[member.indices])
                silent = False
        if silent:
            raise ValueError(
                f"Pruner: criterion {type(criterion).__name__} cannot score the channels of {', '.join(map(repr, group.outputs()))}; "
                "put them in ignore or choose another criterion"
            )
        if not bool(torch.isfinite(total).all()):
            raise RuntimeError(f"Pruner: the criterion must give finite scores, got NaN or infinite ones for {group.root!r}")
        return total

    def _choose(self, group: Group, scores: Tensor, count: int) -> list[int]:
        """The channels of the ``count`` sets with the lowest scores, leaving every layer its best one."""
        sets = scores.view(group.unit, -1).sum(0)
        candidates = torch.ones_like(sets, dtype=torch.bool)
        for member in group.members:
            if member.side == "out":
                candidates[_best(sets, member.roots)] = False
        chosen = lowest(sets, candidates, min(count, int(candidates.sum()))).nonzero().squeeze(1).tolist()
        return [position + k * sets.numel() for k in range(group.unit) for position in chosen]

    def _surplus(self, group: Group, share: float) -> int:
        """How many sets of channels have to go to reach ``share`` of the group's own budget."""
        initial = self.initial[group.root]
        return self._sets_above(group, initial - round(share * self.ratios[group.root] * initial))

    def _sets_above(self, group: Group, target: int) -> int:
        """Sets of channels beyond ``target``, rounded up to what ``round_to`` and grouped layers allow."""
        step = math.lcm(group.unit, self.round_to)
        keep = max(step, math.ceil(target / step) * step)
        return max(0, group.channels - keep) // group.unit

    def _global_surplus(self, scores: Mapping[Group, Tensor], share: float) -> dict[Group, int]:
        """Hand one budget to the lowest-scored sets of all groups, each group's scores divided by their mean."""
        initial = sum(self.initial[group.root] for group in scores)
        ratio = next(iter(self.ratios.values()))  # one number for all: scope="global" takes no dict
        budget = round(share * ratio * initial) - (initial - sum(group.channels for group in scores))
        ranked = []
        for order, (group, score) in enumerate(scores.items()):
            sets = score.view(group.unit, -1).sum(0)
            mean = float(sets.mean())
            ranked += [(value / mean if mean else 0.0, order, position, group) for position, value in enumerate(sets.tolist())]
        taken = dict.fromkeys(scores, 0)
        for *_, group in sorted(ranked, key=lambda entry: entry[:3]):
            if group.unit <= budget and taken[group] + 1 < group.channels // group.unit:
                taken[group] += 1
                budget -= group.unit
        return {group: self._sets_above(group, group.channels - taken[group] * group.unit) for group in scores}

    def _leave_out_mixed(self, graph: ChannelGraph, rehearsal: Rehearsal, generator: torch.Generator) -> None:
        """Rehearse the final widths with channels drawn at random; groups whose removal gives wrong results keep their channels."""
        channels = {
            group: self._choose(group, torch.rand(group.channels, generator=generator), self._surplus(group, 1.0))
            for group in self._groups(graph)
        }
        try:
            self._rehearsed(graph, channels, rehearsal)
        except MixedGroups as error:
            for group in error.groups:
                del self.ratios[group.root], self.initial[group.root]
                self.fixed.update(dict.fromkeys(group.outputs(), error.reason))
            self._leave_out_mixed(graph, rehearsal, generator)

    def _rehearsed(self, graph: ChannelGraph, channels: Mapping[Group, list[int]], rehearsal: Rehearsal) -> Cuts:
        """The cuts that remove ``channels``, after a copy of the model has shown that it computes the right thing without them."""
        cuts: Cuts = {}
        for group, indices in channels.items():
            if indices:
                merge_cuts(cuts, graph.cut(group, indices))
        if not cuts:
            return cuts
        try:
            rehearsal(cuts)
        except Exception as error:
            failures = {group: _failure(rehearsal, graph.cut(group, indices)) for group, indices in channels.items() if indices}
            crashed = [group for group, failure in failures.items() if failure and not isinstance(failure, MixedChannels)]
            mixed = [group for group, failure in failures.items() if isinstance(failure, MixedChannels)]
            blame = ", ".join(repr(group.root) for group in crashed or mixed)
            advice = f"the channels of {blame} have to stay: put them in ignore" if blame else "no layer alone is to blame"
            text = f"Pruner: the model must run with fewer channels, got {type(error).__name__}: {error}; {advice}"
            if mixed and not crashed:
                raise MixedGroups(text, mixed, str(failures[mixed[0]])) from error
            raise RuntimeError(text) from error
        return cuts


class MixedGroups(RuntimeError):
    """Groups whose channels cannot be removed, though the model would run without them."""

    def __init__(self, text: str, groups: Sequence[Group], reason: str) -> None:
        super().__init__(text)
        self.groups, self.reason = groups, reason


def _failure(rehearsal: Rehearsal, cuts: Cuts) -> Exception | None:
    try:
        rehearsal(cuts)
    except Exception as error:  # whatever the model raises: the caller tells the user
        return error
    return None


def _trace(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    try:
        return ChannelGraph(model, example_inputs)
    except Exception as error:
        strange = ", ".join(by_reason(untraceable(model)))
        cause = f"; channels cannot be followed through {strange}: take a mask pattern, or prune the parts around as models of their own"
        raise RuntimeError(
            f"Pruner: pattern 'channel' must be able to trace the model, got {type(error).__name__}: {error}{cause if strange else ''}; "
            "the model is unchanged"
        ) from error


def _best(sets: Tensor, roots: list[int]) -> int:
    """Position, among the sets, of the highest-scored one that holds a channel of ``roots``."""
    positions = torch.tensor(sorted({root % sets.numel() for root in roots}))
    return int(positions[sets[positions].argmax()])


def _group_ratio(group: Group, ratios: Mapping[str, float]) -> float | None:
    """The ratio its layers ask for, None if none does; they share channels, so they have to agree."""
    asked = {name: ratios[name] for name in group.outputs() if name in ratios}
    if len(set(asked.values())) > 1:
        raise ValueError(f"Pruner: ratio must be the same for layers that share channels, got {asked}")
    return next(iter(asked.values()), None)
