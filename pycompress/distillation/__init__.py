"""Knowledge distillation: a small model learns what a large one, or several, or its peers know.

``Distiller`` trains a student from frozen teachers with any sum of the losses in ``LOSSES``.
"""

from .checkpoint import load_state, save_state
from .distiller import Distiller
from .history import EpochRecord, History
from .losses import (
    LOSSES,
    AttentionTransferLoss,
    CombinedLoss,
    CorrelationCongruenceLoss,
    DistillationLoss,
    DISTLoss,
    DKDLoss,
    FeatureLoss,
    FSPLoss,
    HintLoss,
    JSDLoss,
    KDLoss,
    PairLoss,
    PKTLoss,
    RelationLoss,
    ResponseLoss,
    ReverseKLLoss,
    RKDLoss,
    SimilarityPreservingLoss,
)
from .teacher import Ensemble

__all__ = [
    "LOSSES",
    "AttentionTransferLoss",
    "CombinedLoss",
    "CorrelationCongruenceLoss",
    "DISTLoss",
    "DKDLoss",
    "DistillationLoss",
    "Distiller",
    "Ensemble",
    "EpochRecord",
    "FSPLoss",
    "FeatureLoss",
    "HintLoss",
    "History",
    "JSDLoss",
    "KDLoss",
    "PKTLoss",
    "PairLoss",
    "RKDLoss",
    "RelationLoss",
    "ResponseLoss",
    "ReverseKLLoss",
    "SimilarityPreservingLoss",
    "load_state",
    "save_state",
]
