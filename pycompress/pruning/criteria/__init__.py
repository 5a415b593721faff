"""Pruning criteria: one file each, one import line each."""

from __future__ import annotations

from .base import CRITERIA, SCORABLE, ChannelCriterion, Criterion, Evidence, EvidenceOf
from .bn_scale import BatchNormScale
from .geometric_median import GeometricMedian
from .lamp import Lamp
from .magnitude import MagnitudeL1, MagnitudeL2
from .obd import OptimalBrainDamage
from .random import Random
from .taylor import Taylor
from .wanda import Wanda

__all__ = [
    "CRITERIA",
    "SCORABLE",
    "BatchNormScale",
    "ChannelCriterion",
    "Criterion",
    "Evidence",
    "EvidenceOf",
    "GeometricMedian",
    "Lamp",
    "MagnitudeL1",
    "MagnitudeL2",
    "OptimalBrainDamage",
    "Random",
    "Taylor",
    "Wanda",
]
