"""``pycompress bench``: how much faster the kernels are than torch's float32 on this machine, for the shapes that matter to you."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Annotated, Any

import typer

from .interleave import interleaved

SHAPES = ("1,1024,1024", "8,2048,2048", "32,768,3072", "128,768,3072", "512,1024,1024")
"""M, K, N of layers in real networks: one token, small batches, transformer blocks."""


@dataclass(frozen=True)
class Row:
    """One kernel on one shape. ``ratio``: median over interleaved rounds of torch fp32 time / kernel time."""

    m: int
    k: int
    n: int
    kernel: str
    ms: float
    fp32_ms: float
    ratio: float
    error: float
    """Norm of the difference to float32 over the norm of the float32 result: what quantizing the input costs."""


def command(
    shapes: Annotated[list[str] | None, typer.Option("--shape", help="M,K,N of a linear layer; may be repeated.")] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="A kernel by name (see `pycompress doctor`), may be repeated; the best one by default.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch and of the kernels.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for each shape.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """int8 linear layers against torch's float32 linear layer. Every result is verified before it is timed."""
    import json

    from ..analysis.latency import torch_threads
    from ..ops import native

    available = native.kernels("int8_matmul")
    for name in kernel or ():
        if name not in available:
            raise typer.BadParameter(f"kernel must be one of {', '.join(available)} here, got {name!r}")
    chosen = list(dict.fromkeys(kernel or available[:1]))
    with torch_threads(threads):
        rows = [row for text in shapes or SHAPES for row in _bench_shape(*_parse(text), chosen, seconds)]
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    from ..analysis.units import table

    cells = [[f"{r.m}, {r.k}, {r.n}", r.kernel, f"{r.fp32_ms:.3g}", f"{r.ms:.3g}", f"{r.ratio:.2f}x", f"{r.error:.4f}"] for r in rows]
    typer.echo(f"int8_linear (float32 in and out, quantized per row on the fly), {threads} thread{'s' * (threads != 1)}\n")
    typer.echo(table(("M, K, N", "kernel", "torch fp32 ms", "int8 ms", "faster", "error"), cells, left=(0, 1)))
    typer.echo("\nfaster: median over interleaved rounds of torch fp32 time / kernel time. error: relative, against fp32.")


def _parse(text: str) -> tuple[int, int, int]:
    try:
        m, k, n = (int(part) for part in text.split(","))
        if min(m, k, n) < 1:
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"expected M,K,N such as 128,768,3072, got {text!r}") from None
    return m, k, n


def _bench_shape(m: int, k: int, n: int, kernels: list[str], seconds: float) -> list[Row]:
    """Verify each kernel against the reference, then time all of them and torch in interleaved rounds."""
    import torch
    from torch.nn.functional import linear

    from .. import ops
    from ..ops.int8_linear import int8_linear_packed
    from ..ops.int8_matmul import pack_weight

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator)
    dense = torch.randn(n, k, generator=generator) / k**0.5
    weight, scale = ops.quantize_weight(dense)
    exact = linear(x, dense)
    specified = ops.int8_linear_reference(x, weight, scale)

    calls: dict[str, Callable[[], Any]] = {"torch": lambda: linear(x, dense)}
    errors = {}
    for name in kernels:
        packed = pack_weight(weight, name)  # once, as a layer does
        call = partial(
            int8_linear_packed,
            x,
            packed,
            scale,
            None,
            n,
            k,
            x_scale=None,
            x_zero_point=None,
            asymmetric=False,
            activation="none",
            kernel=name,
        )
        result = call()
        torch.testing.assert_close(result, specified, rtol=1e-5, atol=1e-5)
        errors[name] = float((result - exact).norm() / exact.norm())
        calls[name] = call
    times = interleaved(calls, seconds)
    return [
        Row(
            m,
            k,
            n,
            name,
            median(times[name]) * 1e3,
            median(times["torch"]) * 1e3,
            median(a / b for a, b in zip(times["torch"], times[name], strict=True)),
            errors[name],
        )
        for name in kernels
    ]
