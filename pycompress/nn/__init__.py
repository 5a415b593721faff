"""Modules that own compressed weights, each a drop-in for a torch.nn layer."""

from .base import LAYERS, CompressedModule
from .embedding import Int4Embedding, Int8Embedding
from .int4_linear import Int4Linear
from .int8_conv1d import Int8Conv1d
from .int8_conv2d import Int8Conv2d
from .int8_linear import Int8Linear
from .int8_sparse24_conv2d import Int8Sparse24Conv2d
from .int8_sparse24_linear import Int8Sparse24Linear
from .int8_weight_only import Int8WeightOnlyConv2d, Int8WeightOnlyLinear
from .sparse24_conv2d import Sparse24Conv2d
from .sparse24_linear import Sparse24Linear

__all__ = [
    "LAYERS",
    "CompressedModule",
    "Int4Embedding",
    "Int4Linear",
    "Int8Conv1d",
    "Int8Conv2d",
    "Int8Embedding",
    "Int8Linear",
    "Int8Sparse24Conv2d",
    "Int8Sparse24Linear",
    "Int8WeightOnlyConv2d",
    "Int8WeightOnlyLinear",
    "Sparse24Conv2d",
    "Sparse24Linear",
]
