"""Distillation loss with its gradient: T^2 KL(teacher || student) + cross-entropy, forward and backward.

    python benchmarks/bench_kd_loss.py [--threads 2] [--rivals pycompress] [--cases 32000] [--write]

Float32 logits, random normal times 2. The baseline "floor" is ``torch.add(s, t, out=g)``: both logits read, one gradient written, which no
loss can undercut; so a "speedup" of 0.5 is twice the floor. The error column is the gradient's, against float64. "MAC/c" counts one per
logit.
"""

from __future__ import annotations

import functools
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import Rival

TEMPERATURE, SOFT, HARD = 3.0, 0.5, 0.5


def case(rows: int, classes: int) -> dict[str, Any]:
    return {"name": f"{rows}x{classes}", "rows": rows, "classes": classes}


CASES = [case(256, 10), case(256, 1000), case(128, 50257), case(512, 32000), case(64, 128256), case(512, 128256)]


@functools.lru_cache(maxsize=1)
def _tensors(rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(rows, classes, generator=generator) * 2 for _ in range(2))
    return s, t, torch.randint(classes, (rows,), generator=generator)


def inputs(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _tensors(case["rows"], case["classes"])


def composition(s: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What people write."""
    soft = F.kl_div(F.log_softmax(s / TEMPERATURE, 1), F.log_softmax(t / TEMPERATURE, 1), reduction="batchmean", log_target=True)
    return SOFT * TEMPERATURE**2 * soft + HARD * F.cross_entropy(s, y)


def gradient(loss, s: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():  # the harness times without
        leaf = s.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(loss(leaf), leaf)
    return grad


def expected(case: dict[str, Any]) -> torch.Tensor:
    s, t, y = inputs(case)
    return gradient(lambda leaf: composition(leaf, t.double(), y), s.double())


def work(case: dict[str, Any]) -> float:
    return case["rows"] * case["classes"]


def floor(case):
    s, t, _ = inputs(case)
    g = torch.empty_like(s)
    return functools.partial(torch.add, s, t, out=g)


def eager(case):
    s, t, y = inputs(case)
    return lambda: gradient(lambda leaf: composition(leaf, t, y), s)


def compiled(case):
    s, t, y = inputs(case)
    torch._dynamo.reset()
    step = torch.compile(composition, dynamic=False)
    return lambda: gradient(lambda leaf: step(leaf, t, y), s)


def ours(kernel: str | None = None):
    def build(case):
        from pycompress.ops import kd_loss

        s, t, y = inputs(case)
        options = {"temperature": TEMPERATURE, "soft_weight": SOFT, "hard_weight": HARD, "kernel": kernel}
        return lambda: gradient(lambda leaf: kd_loss(leaf, t, y, **options), s)

    return build


RIVALS = {
    "floor": Rival(floor, compare=False),
    "torch eager": Rival(eager),
    "torch.compile": Rival(compiled),
    "pycompress": Rival(ours()),
    "pycompress avx2": Rival(ours("avx2")),
}


if __name__ == "__main__":
    harness.run("kd_loss", cases=CASES, rivals=RIVALS, expected=expected, work=work, baseline="floor", memory=True)
