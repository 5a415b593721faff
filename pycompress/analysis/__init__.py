"""Facts about a model: what it stores, what it computes, how long it takes. Nothing here changes a model."""

from .compare import Comparison, compare
from .cost import Cost, LayerCost, cost
from .latency import Latency, measure, measure_latency
from .layer_latency import measure_layers
from .report import LayerReport, Report, report

__all__ = [
    "Comparison",
    "Cost",
    "Latency",
    "LayerCost",
    "LayerReport",
    "Report",
    "compare",
    "cost",
    "measure",
    "measure_latency",
    "measure_layers",
    "report",
]
