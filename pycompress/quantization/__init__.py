"""Quantization: fewer bits for weights and activations, after training or during it."""

from .algorithms import ALGORITHMS, adaround, bias_correction, cross_layer_equalization, gptq, hqq, smoothquant
from .codebook import CODEBOOKS
from .configs import Codebook, FakeQuant, Int8Dynamic, Int8Static, Int8WeightOnly, QuantizationConfig
from .configs_embedding import EmbeddingWeightOnly
from .configs_int4 import Int4WeightOnly, Int8ActInt4Weight
from .fake_quantize import ActivationQuantizer, FakeQuantize
from .fold import fold_batch_norm
from .mixed_precision import mixed_precision
from .observers import OBSERVERS, Observer
from .quantizer import Quantizer, quantize
from .scheme import Scheme
from .sensitivity import LayerSensitivity, sensitivity

__all__ = [
    "ALGORITHMS",
    "CODEBOOKS",
    "OBSERVERS",
    "ActivationQuantizer",
    "Codebook",
    "EmbeddingWeightOnly",
    "FakeQuant",
    "FakeQuantize",
    "Int4WeightOnly",
    "Int8ActInt4Weight",
    "Int8Dynamic",
    "Int8Static",
    "Int8WeightOnly",
    "LayerSensitivity",
    "Observer",
    "QuantizationConfig",
    "Quantizer",
    "Scheme",
    "adaround",
    "bias_correction",
    "cross_layer_equalization",
    "fold_batch_norm",
    "gptq",
    "hqq",
    "mixed_precision",
    "quantize",
    "sensitivity",
    "smoothquant",
]
