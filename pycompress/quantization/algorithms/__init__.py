"""Post-training algorithms: one file each, one import line here."""

from .adaround import adaround
from .base import ALGORITHMS, Algorithm, check_algorithms
from .bias_correction import bias_correction
from .cross_layer_equalization import cross_layer_equalization
from .gptq import gptq
from .hqq import hqq
from .smoothquant import smoothquant

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "adaround",
    "bias_correction",
    "check_algorithms",
    "cross_layer_equalization",
    "gptq",
    "hqq",
    "smoothquant",
]
