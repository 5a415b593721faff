"""Every op with CUDA kernels as a call with CPU tensors, on the emulated kernels."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from pycompress import ops
from pycompress.ops.cuda import extension
from pycompress.ops.cuda import kd_loss as cuda_kd_loss
from pycompress.ops.kd_loss_options import check_options
from pycompress.ops.sparse24 import sparse24_compress, sparse24_mask
from support import cuda_int8, cuda_sparse24, cuda_weight_only
from support import cuda_kd_loss as emulated_kd_loss

N, K = 24, 80
SEEN_BY = {
    "kernel_for": ("ops.int8_weight_linear", "ops.int4_linear", "nn.int8_weight_only", "nn.int4_linear"),
    "sparse24_kernel": (
        "ops.sparse24_linear", "ops.int8_sparse24_linear", "ops.sparse24_conv2d", "ops.int8_sparse24_conv2d", "nn.sparse24_weight",
    ),
}  # fmt: skip
"""Names of the functions that choose a kernel, and the modules that have them under that name."""


class Module:
    """The emulated modules as one, in place of ``_C_cuda``. Notes the calls; ``device`` takes the place of the device in each."""

    def __init__(self) -> None:
        self.parts = [part.emulated() for part in (cuda_int8, cuda_weight_only, cuda_sparse24, emulated_kd_loss)]
        self.calls: list[str] = []
        self.device: int | None = None

    def __getattr__(self, name: str) -> Any:
        found = next(getattr(part, name) for part in self.parts if hasattr(part, name))
        if name == "KdLossCudaPlan":
            return lambda *options: self._noted(name, found(*options))
        return self._noted(name, found) if callable(found) and not name.endswith(("_configs", "_bytes")) else found

    def _noted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            *rest, device, stream = arguments  # so end all bindings that launch
            return function(*rest, device if self.device is None else self.device, stream)

        return call

    def take_launches(self) -> list[int]:
        return [device for part in self.parts for device in part.take_launches()]

    def current_devices(self) -> set[int]:
        return {part.current_device() for part in self.parts}


def use(monkeypatch: pytest.MonkeyPatch) -> Module:
    """CPU tensors are treated as if they were on a GPU, which has the emulated kernels."""
    module = Module()
    for function, modules in SEEN_BY.items():
        choose = (lambda op, x, kernel, where: kernel or extension.NAME) if function == "kernel_for" else (
            lambda op, x, pattern, kernel: kernel or extension.NAME
        )  # fmt: skip
        for name in modules:
            monkeypatch.setattr(import_module(f"pycompress.{name}"), function, choose)
    for name in ("ops.int8_matmul", "ops.int8_linear", "nn.int8_linear"):
        monkeypatch.setattr(import_module(f"pycompress.{name}"), "kernel_for", lambda x, kernel, where="": kernel or extension.NAME)
    monkeypatch.setattr(extension, "module", module)
    monkeypatch.setattr(extension, "stream", lambda device: 0)
    monkeypatch.setattr(extension, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(extension, "capability", lambda index: (9, 0))
    return module


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _kd_loss(x: Tensor) -> Tensor:
    student = x if x.stride(1) == 1 else x.contiguous()  # the kernel's contract, which kd_loss sees to
    how = {"temperature": 2.0, "soft_weight": 0.5, "hard_weight": 0.0}
    options = check_options("kd_loss", *how.values(), "forward_kl", None, None, 0.0, -100, "mean", "logits", False)
    gradient = torch.empty(x.shape, dtype=x.dtype)
    cuda_kd_loss.run(student, random(*x.shape, seed=9).to(x.dtype), None, None, None, None, 0, options, gradient, x.shape[0])
    return gradient


def table() -> dict[str, Callable[[Tensor], Tensor]]:
    """Name to a function of x (rows, K) in float32, bfloat16 or float16; weights are made anew, so that a call packs them."""
    q, scale = ops.quantize_weight(random(N, K, seed=1))
    int4 = ops.quantize_weight_int4(random(N, K, seed=1), 32, False)
    mask = sparse24_mask(random(N, K, seed=2))
    sparse, sparse8 = sparse24_compress(random(N, K, seed=1), mask), sparse24_compress(q * mask)

    def image(x: Tensor) -> Tensor:
        return x.reshape(-1, 5, 4, 4)

    return {
        "int8_matmul": lambda x: ops.int8_matmul((x.float() * 30).to(torch.int8), q),
        "int8_linear": lambda x: ops.int8_linear(x, q, scale),
        "int8_weight_linear": lambda x: ops.int8_weight_linear(x, q, scale),
        "int4_linear": lambda x: ops.int4_linear(x, *int4, group_size=32),
        "int4_linear, int8 activations": lambda x: ops.int4_linear(x, *int4, group_size=32, int8_activations=True),
        "sparse24_linear": lambda x: ops.sparse24_linear(x, *sparse),
        "int8_sparse24_linear": lambda x: ops.int8_sparse24_linear(x, *sparse8, scale),
        "sparse24_conv2d": lambda x: ops.sparse24_conv2d(image(x), *sparse, kernel_size=4, padding=1),
        "int8_sparse24_conv2d": lambda x: ops.int8_sparse24_conv2d(image(x), *sparse8, scale, kernel_size=4, padding=1),
        "kd_loss": _kd_loss,
    }


NAMES = list(table())
