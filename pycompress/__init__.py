"""Model compression for PyTorch: quantization, pruning and distillation on native kernels.

The names below are loaded on first use, so ``import pycompress`` costs next to nothing and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `_PUBLIC` says, in the words that type checkers and editors read
    from . import analysis as analysis
    from . import distillation as distillation
    from . import io as io
    from . import nn as nn
    from . import ops as ops
    from . import pruning as pruning
    from . import quantization as quantization
    from .analysis import compare as compare
    from .analysis import report as report
    from .distillation import Distiller as Distiller
    from .distillation import KDLoss as KDLoss
    from .distillation import LinearKDLoss as LinearKDLoss
    from .io import load as load
    from .io import save as save
    from .pruning import Pruner as Pruner
    from .pruning import prune as prune
    from .quantization import Codebook as Codebook
    from .quantization import EmbeddingWeightOnly as EmbeddingWeightOnly
    from .quantization import FakeQuant as FakeQuant
    from .quantization import Int4WeightOnly as Int4WeightOnly
    from .quantization import Int8ActInt4Weight as Int8ActInt4Weight
    from .quantization import Int8Dynamic as Int8Dynamic
    from .quantization import Int8Static as Int8Static
    from .quantization import Int8WeightOnly as Int8WeightOnly
    from .quantization import Quantizer as Quantizer
    from .quantization import quantize as quantize

    __version__: str

_PACKAGES = ("analysis", "distillation", "io", "nn", "ops", "pruning", "quantization")

_PUBLIC = {
    "Codebook": "quantization",
    "Distiller": "distillation",
    "EmbeddingWeightOnly": "quantization",
    "FakeQuant": "quantization",
    "Int4WeightOnly": "quantization",
    "Int8ActInt4Weight": "quantization",
    "Int8Dynamic": "quantization",
    "Int8Static": "quantization",
    "Int8WeightOnly": "quantization",
    "KDLoss": "distillation",
    "LinearKDLoss": "distillation",
    "Pruner": "pruning",
    "Quantizer": "quantization",
    "compare": "analysis",
    "load": "io",
    "prune": "pruning",
    "quantize": "quantization",
    "report": "analysis",
    "save": "io",
}
"""Public name -> the package that defines it."""

__all__ = [
    "Codebook",
    "Distiller",
    "EmbeddingWeightOnly",
    "FakeQuant",
    "Int4WeightOnly",
    "Int8ActInt4Weight",
    "Int8Dynamic",
    "Int8Static",
    "Int8WeightOnly",
    "KDLoss",
    "LinearKDLoss",
    "Pruner",
    "Quantizer",
    "compare",
    "load",
    "prune",
    "quantize",
    "report",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    elif name in _PACKAGES:
        value = import_module(f".{name}", __name__)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, *_PACKAGES, "__version__"])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:  # a source tree on the path, not an installation
        return "0+source"
