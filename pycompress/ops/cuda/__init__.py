"""CUDA kernels: plans, allocations and calls. Importing it touches no GPU and needs no extension."""
