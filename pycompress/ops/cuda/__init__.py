"""CUDA kernels: plans, allocations and calls. Nothing here is imported where there is no CUDA extension."""
