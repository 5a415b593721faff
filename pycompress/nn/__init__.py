"""Modules that own compressed weights, each a drop-in for a torch.nn layer."""

from .base import LAYERS, CompressedModule
from .int8_conv2d import Int8Conv2d
from .int8_linear import Int8Linear
from .int8_weight_only import Int8WeightOnlyConv2d, Int8WeightOnlyLinear

__all__ = ["LAYERS", "CompressedModule", "Int8Conv2d", "Int8Linear", "Int8WeightOnlyConv2d", "Int8WeightOnlyLinear"]
