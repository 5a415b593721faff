"""Distillation losses: on logits (response), on features, on relations between samples.

``LOSSES`` names them all. To add one: one file with ``@LOSSES.register("name")`` and one import line here; the contract tests
over the registry then test it.
"""

from .attention_transfer import AttentionTransferLoss
from .base import LOSSES, CombinedLoss, DistillationLoss, Outputs, PairLoss
from .correlation import CorrelationCongruenceLoss
from .dist import DISTLoss
from .dkd import DKDLoss
from .feature import FeatureLoss
from .fsp import FSPLoss
from .hint import HintLoss
from .kd import JSDLoss, KDLoss, ResponseLoss, ReverseKLLoss
from .linear_kd import LinearKDLoss
from .pkt import PKTLoss
from .relation import RelationLoss
from .rkd import RKDLoss
from .similarity import SimilarityPreservingLoss

__all__ = [
    "LOSSES",
    "AttentionTransferLoss",
    "CombinedLoss",
    "CorrelationCongruenceLoss",
    "DISTLoss",
    "DKDLoss",
    "DistillationLoss",
    "FSPLoss",
    "FeatureLoss",
    "HintLoss",
    "JSDLoss",
    "KDLoss",
    "LinearKDLoss",
    "Outputs",
    "PKTLoss",
    "PairLoss",
    "RKDLoss",
    "RelationLoss",
    "ResponseLoss",
    "ReverseKLLoss",
    "SimilarityPreservingLoss",
]
