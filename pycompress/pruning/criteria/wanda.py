"""Wanda: a weight matters as much as what it multiplies."""

from __future__ import annotations

from torch import Tensor

from .base import CRITERIA, Criterion, Evidence


@CRITERIA.register("wanda")
class Wanda(Criterion):
    """``|w| * ||x||`` with the norm of the input feature (Sun et al. 2023, arXiv:2306.11695, section 3).

    The norm is a root mean square over samples and positions, which orders the weights of a layer as the L2 norm does and is
    comparable between layers. For convolutions it is taken per input channel, whatever the kernel position.
    """

    needs = frozenset({"activations"})

    def scores(self, evidence: Evidence) -> Tensor:
        assert evidence.input_norm is not None
        return evidence.weight.abs() * evidence.along_inputs(evidence.input_norm)
