"""Knowledge distillation: a small model learns what a large one, or several, or its peers know.

``Distiller`` trains a student from frozen teachers with any sum of the losses in ``LOSSES``; ``MutualLearning`` trains peers,
``born_again`` generations, and ``TeacherCache`` keeps a teacher's logits so that it runs once per sample.
"""

from .born_again import born_again
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
    LinearKDLoss,
    PairLoss,
    PKTLoss,
    RelationLoss,
    ResponseLoss,
    ReverseKLLoss,
    RKDLoss,
    SimilarityPreservingLoss,
)
from .mutual import MutualLearning
from .teacher import Ensemble
from .teacher_cache import TeacherCache

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
    "LinearKDLoss",
    "MutualLearning",
    "PKTLoss",
    "PairLoss",
    "RKDLoss",
    "RelationLoss",
    "ResponseLoss",
    "ReverseKLLoss",
    "SimilarityPreservingLoss",
    "TeacherCache",
    "born_again",
    "load_state",
    "save_state",
]
