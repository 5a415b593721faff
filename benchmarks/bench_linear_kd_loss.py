"""Distillation loss from hidden states and heads, forward and gradients of hidden states and head, against its matrix products.

    python benchmarks/bench_linear_kd_loss.py [--threads 2] [--cases 32000] [--write]

The baseline "four products" is student logits, teacher logits, gradient of the hidden states and gradient of the head, each whole and
into a buffer that is there: a loss that forms logits cannot do less. "peak MB" holds the two gradients, which every rival returns; two
chunks of logits are at most 2 x 128 MiB (at least 256 rows). The error column is the head gradient's, against float64.
"""

from __future__ import annotations

import functools
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import Rival

TEMPERATURE, SOFT, HARD = 2.0, 0.5, 0.5


def case(rows: int, features: int, teacher_features: int, classes: int) -> dict[str, Any]:
    sizes = {"rows": rows, "features": features, "teacher_features": teacher_features, "classes": classes}
    return {"name": f"{rows} x {features}/{teacher_features} x {classes}", **sizes}


CASES = [case(1024, 256, 512, 8192), case(1024, 384, 768, 32000), case(256, 256, 512, 128256)]


@functools.lru_cache(maxsize=1)
def _tensors(rows: int, features: int, teacher_features: int, classes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, features), (classes, features), (rows, teacher_features), (classes, teacher_features)]
    return [torch.randn(*shape, generator=generator) / shape[1] ** 0.25 for shape in shapes] + [
        torch.randint(classes, (rows,), generator=generator)
    ]


def inputs(case: dict[str, Any]) -> list[torch.Tensor]:
    return _tensors(case["rows"], case["features"], case["teacher_features"], case["classes"])


def composition(h, w, th, tw, y) -> torch.Tensor:
    """What people write."""
    s, t = F.linear(h, w), F.linear(th, tw)
    soft = F.kl_div(F.log_softmax(s / TEMPERATURE, 1), F.log_softmax(t / TEMPERATURE, 1), reduction="batchmean", log_target=True)
    return SOFT * TEMPERATURE**2 * soft + HARD * F.cross_entropy(s, y)


def gradients(loss, h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.enable_grad():  # the harness times without
        leaves = h.detach().requires_grad_(True), w.detach().requires_grad_(True)
        to_hidden, to_head = torch.autograd.grad(loss(*leaves), leaves)
    return to_hidden, to_head


def expected(case: dict[str, Any]) -> torch.Tensor:
    h, w, th, tw, y = inputs(case)
    return gradients(lambda a, b: composition(a, b, th.double(), tw.double(), y), h.double(), w.double())[1]


def work(case: dict[str, Any]) -> float:
    return case["rows"] * case["classes"] * (3 * case["features"] + case["teacher_features"])


def products(case):
    h, w, th, tw, _ = inputs(case)
    s, t = (torch.empty(len(h), len(w)) for _ in range(2))
    to_hidden, to_head = torch.empty_like(h), torch.empty_like(w)

    def run():
        torch.mm(h, w.T, out=s)
        torch.mm(th, tw.T, out=t)
        torch.mm(s, w, out=to_hidden)
        torch.mm(s.T, h, out=to_head)

    return run


def eager(case):
    h, w, th, tw, y = inputs(case)
    return lambda: gradients(lambda a, b: composition(a, b, th, tw, y), h, w)[1]


def compiled(case):
    h, w, th, tw, y = inputs(case)
    torch._dynamo.reset()
    step = torch.compile(composition, dynamic=False)
    return lambda: gradients(lambda a, b: step(a, b, th, tw, y), h, w)[1]


def ours(kernel: str | None = None):
    def build(case):
        from pycompress.ops import linear_kd_loss

        h, w, th, tw, y = inputs(case)
        options = {"temperature": TEMPERATURE, "soft_weight": SOFT, "hard_weight": HARD, "kernel": kernel}
        return lambda: gradients(lambda a, b: linear_kd_loss(a, b, th, tw, y, **options), h, w)[1]

    return build


RIVALS = {
    "four products": Rival(products, compare=False),
    "torch eager": Rival(eager),
    "torch.compile": Rival(compiled),
    "pycompress": Rival(ours()),
    "pycompress avx2": Rival(ours("avx2")),
}


if __name__ == "__main__":
    harness.run("linear_kd_loss", cases=CASES, rivals=RIVALS, expected=expected, work=work, baseline="four products", memory=True)
