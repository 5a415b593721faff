"""What every distillation loss has in common, and the registry that names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from ...registry import Registry

LOSSES: Registry[type[nn.Module]] = Registry("distillation loss")
"""Loss classes by name. A new loss is one file with ``@LOSSES.register(name)`` and one import line in ``losses/__init__.py``."""


@dataclass
class Outputs:
    """What student and teacher said about one batch."""

    student_logits: Tensor | None = None
    teacher_logits: Tensor | None = None
    labels: Tensor | None = None
    student_features: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_features: Mapping[str, Tensor] = field(default_factory=dict)


class DistillationLoss(nn.Module):
    """A loss that :class:`~pycompress.distillation.Distiller` can use.

    Losses add up: ``KDLoss() + FeatureLoss(...)``. Learnable parts (a hint's adapter) are ordinary parameters of the
    loss and train with the student.
    """

    name: str = "loss"
    """Key under which the loss appears in the history."""

    needs_logits: bool = False
    """Whether the loss reads the logits of both models."""

    needs_teacher_logits: bool = False
    """Whether the loss reads the teacher's logits (not with a soft weight of 0)."""

    temperature: float | None = None
    """The temperature at which the teacher is read, if the loss has one."""

    @property
    def student_paths(self) -> tuple[str, ...]:
        """Modules of the student whose outputs the loss reads."""
        return ()

    @property
    def teacher_paths(self) -> tuple[str, ...]:
        """Modules of the teacher whose outputs the loss reads."""
        return ()

    @property
    def is_prepared(self) -> bool:
        """False while learnable parts still wait for the shapes of the first batch."""
        return True

    def prepare(self, outputs: Outputs) -> None:
        """Make learnable parts for the shapes in ``outputs``. Nothing to do for most losses."""

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Weighted scalar terms by name; the loss of a batch is their sum."""
        raise NotImplementedError

    def kernels(self, outputs: Outputs) -> dict[str, str]:
        """What computes each term for such outputs, under the names of ``terms``; for the history."""
        return {self.name: "torch"}

    def response(self) -> DistillationLoss | None:
        """The part that compares logits with labels (it knows their layout), or None."""
        return None

    def __add__(self, other: DistillationLoss) -> CombinedLoss:
        if not isinstance(other, DistillationLoss):
            return NotImplemented
        mine = self.parts() if isinstance(self, CombinedLoss) else [(self.name, 1.0, self)]
        theirs = other.parts() if isinstance(other, CombinedLoss) else [(other.name, 1.0, other)]
        names = unique_names([name for name, _, _ in [*mine, *theirs]])
        parts = list(zip(names, [*mine, *theirs], strict=True))
        return CombinedLoss({name: loss for name, (_, _, loss) in parts}, {name: weight for name, (_, weight, _) in parts})


class PairLoss(nn.Module):
    """Compares one student feature with one teacher feature: ``loss(student, teacher) -> scalar``.

    Used through :class:`~pycompress.distillation.FeatureLoss`, which takes the features from named modules, or by hand.
    """

    kind: Literal["feature", "relation"] = "feature"

    arity: int = 1
    """How many modules of each model one pair names; with more than one, ``forward`` takes tuples of tensors."""

    @property
    def is_prepared(self) -> bool:
        return True

    def prepare(self, student: Tensor, teacher: Tensor) -> None:
        """Make learnable parts for these shapes."""


class CombinedLoss(DistillationLoss):
    """Weighted sum of named losses.

    ``losses``: name -> loss, or a list (named after the losses' own names, ``"hint"``, ``"hint_2"``, ...).
    ``weights``: name -> factor, 1 where left out; a list of weights goes with a list of losses. Weights are finite
    and not negative, and at least one is positive; a loss of weight 0 is not computed.

    >>> loss = CombinedLoss({"kd": KDLoss(), "hint": FeatureLoss({"layer2": "layer3"})}, weights={"hint": 0.1})
    """

    def __init__(
        self,
        losses: Mapping[str, DistillationLoss] | list[DistillationLoss] | tuple[DistillationLoss, ...],
        weights: Mapping[str, float] | list[float] | tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(losses, Mapping):
            losses = list(losses)
            if weights is not None and not isinstance(weights, Mapping):
                weights = list(weights)
                if len(weights) != len(losses):
                    raise ValueError(f"CombinedLoss: weights must have one entry per loss ({len(losses)}), got {len(weights)}")
            names = unique_names([getattr(loss, "name", "loss") for loss in losses])
            losses = dict(zip(names, losses, strict=True))
            if weights is not None and not isinstance(weights, Mapping):
                weights = dict(zip(names, weights, strict=True))
        elif weights is not None and not isinstance(weights, Mapping):
            raise TypeError("CombinedLoss: weights must be a mapping when losses is one, got a list")
        if not losses:
            raise ValueError("CombinedLoss: losses must hold at least one loss, got none")
        for name, loss in losses.items():
            if not isinstance(loss, DistillationLoss):
                raise TypeError(f"CombinedLoss: losses must be distillation losses, got {type(loss).__name__} for {name!r}")
            if not isinstance(name, str) or not name or "." in name:
                raise ValueError(f"CombinedLoss: names of losses must be strings without a dot, got {name!r}")
        given = dict(weights or {})
        unknown = sorted(set(given) - set(losses))
        if unknown:
            raise ValueError(f"CombinedLoss: weights must name losses ({', '.join(losses)}), got {', '.join(map(repr, unknown))}")
        self.weights = {name: float(given.get(name, 1.0)) for name in losses}
        for name, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"CombinedLoss: weights must be finite and not negative, got {weight} for {name!r}")
        if not any(self.weights.values()):
            raise ValueError("CombinedLoss: at least one weight must be positive, got 0 for all")
        self.losses = nn.ModuleDict(losses)
        self.name = "+".join(losses)

    def parts(self) -> list[tuple[str, float, DistillationLoss]]:
        """(name, weight, loss) of each part."""
        return [(name, self.weights[name], loss) for name, loss in self._active(everything=True)]

    def _active(self, everything: bool = False) -> Iterator[tuple[str, DistillationLoss]]:
        for name, loss in self.losses.items():
            if everything or self.weights[name] > 0:
                assert isinstance(loss, DistillationLoss)
                yield name, loss

    @property
    def needs_logits(self) -> bool:  # type: ignore[override]
        return any(loss.needs_logits for _, loss in self._active())

    @property
    def needs_teacher_logits(self) -> bool:  # type: ignore[override]
        return any(loss.needs_teacher_logits for _, loss in self._active())

    @property
    def temperature(self) -> float | None:  # type: ignore[override]
        found = sorted({loss.temperature for _, loss in self._active() if loss.temperature is not None})
        if len(found) > 1:
            raise ValueError(
                f"CombinedLoss: the losses read the teacher at several temperatures ({', '.join(map(str, found))}); "
                "pass the teachers as Ensemble(models, mean=..., temperature=...) to say at which one they are averaged"
            )
        return found[0] if found else None

    @property
    def student_paths(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for _, loss in self._active() for path in loss.student_paths))

    @property
    def teacher_paths(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for _, loss in self._active() for path in loss.teacher_paths))

    @property
    def is_prepared(self) -> bool:
        return all(loss.is_prepared for _, loss in self._active())

    def prepare(self, outputs: Outputs) -> None:
        for _, loss in self._active():
            loss.prepare(outputs)

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, loss in self._active():
            terms = loss.terms(outputs)
            for inner, value in terms.items():
                found[_key(name, inner, terms)] = self.weights[name] * value
        return found

    def kernels(self, outputs: Outputs) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, loss in self._active():
            kernels = loss.kernels(outputs)
            found |= {_key(name, inner, kernels): kernel for inner, kernel in kernels.items()}
        return found

    def response(self) -> DistillationLoss | None:
        return next((part for _, loss in self._active() if (part := loss.response()) is not None), None)

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def _key(name: str, inner: str, terms: Mapping[str, object]) -> str:
    """A loss of one term goes by its own name, one of several by ``name/term``."""
    return name if len(terms) == 1 else f"{name}/{inner}"


def unique_names(names: list[str]) -> list[str]:
    """``["hint", "kd", "hint"]`` -> ``["hint", "kd", "hint_2"]``."""
    used: set[str] = set()
    found = []
    for name in names:
        candidate, count = name, 1
        while candidate in used:
            count += 1
            candidate = f"{name}_{count}"
        used.add(candidate)
        found.append(candidate)
    return found
