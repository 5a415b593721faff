"""Functions on tensors. Each is a readable PyTorch reference, overridden by a native kernel where one is installed."""

from .affine import dequantize_affine, fake_quantize_affine, quantize_affine, quantize_weight, symmetric_scale
from .int4 import dequantize_int4, quantize_weight_int4
from .int4_linear import int4_linear, int4_linear_reference
from .int8_conv2d import int8_conv2d
from .int8_conv2d_reference import int8_conv2d_reference
from .int8_linear import int8_linear, int8_linear_reference
from .int8_matmul import int8_matmul, int8_matmul_reference
from .int8_sparse24_conv2d import int8_sparse24_conv2d, int8_sparse24_conv2d_reference
from .int8_sparse24_linear import int8_sparse24_linear, int8_sparse24_linear_reference
from .int8_weight_linear import int8_weight_linear, int8_weight_linear_reference
from .kd_loss import kd_loss
from .kd_loss_reference import kd_loss_reference
from .linear_kd_loss import linear_kd_loss
from .sparse24 import sparse24_check, sparse24_compress, sparse24_mask, sparse24_to_dense
from .sparse24_conv2d import sparse24_conv2d, sparse24_conv2d_reference
from .sparse24_cutlass import sparse24_from_cutlass, sparse24_to_cutlass
from .sparse24_linear import sparse24_linear, sparse24_linear_reference

__all__ = [
    "dequantize_affine",
    "dequantize_int4",
    "fake_quantize_affine",
    "int4_linear",
    "int4_linear_reference",
    "int8_conv2d",
    "int8_conv2d_reference",
    "int8_linear",
    "int8_linear_reference",
    "int8_matmul",
    "int8_matmul_reference",
    "int8_sparse24_conv2d",
    "int8_sparse24_conv2d_reference",
    "int8_sparse24_linear",
    "int8_sparse24_linear_reference",
    "int8_weight_linear",
    "int8_weight_linear_reference",
    "kd_loss",
    "kd_loss_reference",
    "linear_kd_loss",
    "quantize_affine",
    "quantize_weight",
    "quantize_weight_int4",
    "sparse24_check",
    "sparse24_compress",
    "sparse24_conv2d",
    "sparse24_conv2d_reference",
    "sparse24_from_cutlass",
    "sparse24_linear",
    "sparse24_linear_reference",
    "sparse24_mask",
    "sparse24_to_cutlass",
    "sparse24_to_dense",
    "symmetric_scale",
]
