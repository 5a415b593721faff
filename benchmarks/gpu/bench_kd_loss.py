"""Distillation loss with its gradient on a GPU, from logits and from hidden states.

    python benchmarks/gpu/bench_kd_loss.py [--cases 128256] [--rivals pycompress] [--linear] [--write]

bfloat16 logits. The floor: both logits read and one gradient written at the bandwidth of a copy. Rivals: torch eager,
torch.compile, Liger-Kernel if it is installed (its loss has no T^2 and no cross-entropy, so only forward KL is compared and its
error column means little). With ``--linear``: 4096 tokens of 4096 features on two heads, against torch eager and the time of the
matrix products alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from timing import copy_bandwidth, event_times, row, try_rival

from pycompress.ops import kd_loss, linear_kd_loss

TEMPERATURE, SOFT, HARD = 2.0, 0.5, 0.5
CASES = [(256, 10), (4096, 1000), (4096, 32000), (4096, 50257), (4096, 128256), (8192, 151936)]


def composition(s: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What people write."""
    log_q, log_p = (F.log_softmax(x.float() / TEMPERATURE, 1) for x in (s, t))
    return SOFT * TEMPERATURE**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) + HARD * F.cross_entropy(s.float(), y)


def ours(s: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return kd_loss(s, t, y, temperature=TEMPERATURE, soft_weight=SOFT, hard_weight=HARD)


def with_gradient(loss: Callable[..., torch.Tensor], s: torch.Tensor, *rest: torch.Tensor) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        leaf = s.detach().requires_grad_(True)
        return torch.autograd.grad(loss(leaf, *rest), leaf)[0]

    return step


def liger() -> Callable[..., torch.Tensor] | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda s, t, y: divergence(F.log_softmax(s / TEMPERATURE, 1), F.log_softmax(t / TEMPERATURE, 1))


def liger_linear(
    hidden: torch.Tensor, head: torch.Tensor, teacher_hidden: torch.Tensor, teacher_head: torch.Tensor, labels: torch.Tensor
) -> Callable[[], Any]:
    """Liger-Kernel's loss of two heads in chunks: its divergence is Jensen-Shannon's family, of which beta 0 is the forward KL."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)

    def run() -> Any:
        leaves = [x.detach().requires_grad_(True) for x in (hidden, head)]
        return torch.autograd.grad(loss(*leaves, teacher_hidden, teacher_head, labels), leaves)

    return run


def logits_cases(chosen: Callable[[str], bool], rivals: list[str], write: bool, bandwidth: float) -> None:
    for rows, classes in CASES:
        name = f"{rows}x{classes}"
        if not chosen(name):
            continue
        generator = torch.Generator(device="cuda").manual_seed(0)
        s, t = (torch.randn(rows, classes, device="cuda", generator=generator).mul_(2).bfloat16() for _ in range(2))
        y = torch.randint(classes, (rows,), device="cuda", generator=generator)
        few = slice(0, 64)
        want = with_gradient(composition, s[few].double(), t[few].double(), y[few])()
        functions = {"torch eager": composition, "torch.compile": torch.compile(composition, dynamic=False), "pycompress": ours}
        if (other := liger()) is not None:
            functions["Liger-Kernel"] = other
        for rival, loss in functions.items():
            if rivals and rival not in rivals:
                continue
            got = with_gradient(loss, s[few], t[few], y[few])()
            error = float((got.double() - want).norm() / want.norm())
            row("kd_loss", name, rival, with_gradient(loss, s, t, y), 3 * s.numel() * s.element_size() / bandwidth, error, write)


def linear_case(rivals: list[str], write: bool) -> None:
    tokens, features, classes = 4096, 4096, 128256
    generator = torch.Generator(device="cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).mul_(0.05).bfloat16()

    hidden, teacher_hidden, head, teacher_head = (
        random(tokens, features),
        random(tokens, features),
        random(classes, features),
        random(classes, features),
    )
    labels = torch.randint(classes, (tokens,), device="cuda", generator=generator)
    chunk = 2048
    logits = torch.empty(chunk, classes, device="cuda", dtype=torch.bfloat16)
    to_head = torch.empty_like(head)

    def products() -> None:  # two products forward, two backward, in chunks
        for begin in range(0, tokens, chunk):
            part = slice(begin, begin + chunk)
            torch.mm(teacher_hidden[part], teacher_head.T, out=logits)
            torch.mm(hidden[part], head.T, out=logits)
            torch.mm(logits, head)
            torch.mm(logits.T, hidden[part], out=to_head)

    def step(loss: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        def run() -> Any:
            leaves = [x.detach().requires_grad_(True) for x in (hidden, head)]
            return torch.autograd.grad(loss(*leaves), leaves)

        return run

    functions = {
        "torch eager": lambda h, w: composition(F.linear(h, w), F.linear(teacher_hidden, teacher_head), labels),
        "pycompress": lambda h, w: linear_kd_loss(
            h, w, teacher_hidden, teacher_head, labels, temperature=TEMPERATURE, soft_weight=SOFT, hard_weight=HARD
        ),
    }
    floor = sorted(event_times(products)[0])[15]
    steps = {rival: step(loss) for rival, loss in functions.items()}
    name = "Liger fused linear JSD"
    if (theirs := try_rival(name, lambda: liger_linear(hidden, head, teacher_hidden, teacher_head, labels))) is not None:
        steps[name] = theirs
    for rival, run in steps.items():
        if not rivals or rival in rivals:
            row("linear_kd_loss", f"{tokens}x{classes}", rival, run, floor, float("nan"), write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--rivals", nargs="*", default=[])
    parser.add_argument("--linear", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_kd_loss: needs a CUDA device")
    if arguments.linear:
        linear_case(arguments.rivals, arguments.write)
    else:
        logits_cases(lambda name: arguments.cases in name, arguments.rivals, arguments.write, copy_bandwidth())


if __name__ == "__main__":
    main()
