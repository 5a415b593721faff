"""int8 linear, float in and out, against torch fp32, torch dynamic int8 and ONNX Runtime.

    python benchmarks/bench_int8_linear.py [--threads 2] [--rivals pycompress,ORT] [--cases 1024] [--write]

Activations are random normal, weights and bias those of a fresh nn.Linear. A "cold" case rotates over layers whose fp32 weights
together pass 256 MB, so no format finds its weights in the last-level cache.
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from typing import Any

import harness
import torch
from harness import Rival
from torch import nn


def case(m: int, k: int, n: int, cold: bool = False) -> dict[str, Any]:
    layers = max(2, (256 << 20) // (4 * k * n)) if cold else 1
    return {"name": f"{m}x{k}x{n}{' cold' if cold else ''}", "m": m, "k": k, "n": n, "layers": layers}


CASES = [
    case(1, 4096, 4096),
    case(1, 4096, 4096, cold=True),
    case(8, 2048, 2048),
    case(32, 768, 3072),
    case(128, 768, 3072),
    case(512, 1024, 1024),
    case(1024, 1024, 4096),
    case(3136, 64, 256),
    case(1, 64, 64),
]


@functools.lru_cache(maxsize=1)
def _layers(m: int, k: int, n: int, layers: int) -> tuple[torch.Tensor, list[nn.Linear]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.randn(m, k), [nn.Linear(k, n).requires_grad_(False) for _ in range(layers)]


def inputs(case: dict[str, Any]) -> tuple[torch.Tensor, list[nn.Linear]]:
    return _layers(case["m"], case["k"], case["n"], case["layers"])


def expected(case: dict[str, Any]) -> torch.Tensor:
    x, layers = inputs(case)
    return layers[0](x)


def macs(case: dict[str, Any]) -> float:
    return case["m"] * case["k"] * case["n"]


def in_turn(functions):
    """A function that calls the given ones in turn, the first one first."""
    if len(functions) == 1:
        return functions[0]
    turn = itertools.cycle(functions)
    return lambda: next(turn)()


def torch_fp32(case):
    x, layers = inputs(case)
    return in_turn([functools.partial(layer, x) for layer in layers])


def ours(kernel: str | None = None, **options):
    def build(case):
        from pycompress.nn import Int8Linear

        x, layers = inputs(case)
        if options.get("x_scale") == "amax":
            options["x_scale"] = x.abs().max().item() / 127
        quantized = [Int8Linear.from_float(layer, **options) for layer in layers]
        if kernel and quantized[0].kernel != kernel:
            raise RuntimeError(f"kernel {quantized[0].kernel} runs instead of {kernel}")
        return in_turn([functools.partial(layer, x) for layer in quantized])

    return build


def torch_dynamic(engine: str, reduce_range: bool):
    """torch.ao dynamic int8 by its operator; 8-bit weights saturate in FBGEMM without VNNI, 7-bit ones give up a bit."""

    def build(case):
        torch.backends.quantized.engine = engine
        x, layers = inputs(case)
        top = 63 if reduce_range and engine == "fbgemm" else 127

        def pack(layer):
            scales = (layer.weight.abs().amax(dim=1) / top).double()
            weight = torch.quantize_per_channel(layer.weight, scales, torch.zeros(layer.out_features, dtype=torch.long), 0, torch.qint8)
            return torch.ops.quantized.linear_prepack(weight, layer.bias)

        packed = [pack(layer) for layer in layers]
        return in_turn([functools.partial(torch.ops.quantized.linear_dynamic, x, p, reduce_range) for p in packed])

    return build


def onnxruntime(quantized: bool, reduce_range: bool = False):
    def build(case):
        import onnx
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper
        from onnxruntime.quantization import QuantType, quantize_dynamic

        x, layers = inputs(case)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3

        def session(layer):
            nodes = [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Add", ["t", "b"], ["y"])]
            tensors = [numpy_helper.from_array(layer.weight.T.contiguous().numpy(), "w"), numpy_helper.from_array(layer.bias.numpy(), "b")]
            shape_in, shape_out = list(x.shape), [case["m"], case["n"]]
            values = [helper.make_tensor_value_info(v, TensorProto.FLOAT, s) for v, s in (("x", shape_in), ("y", shape_out))]
            graph = helper.make_graph(nodes, "linear", values[:1], values[1:], tensors)
            with tempfile.TemporaryDirectory() as folder:
                path, out = os.path.join(folder, "f.onnx"), os.path.join(folder, "q.onnx")
                onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
                if quantized:
                    quantize_dynamic(path, out, weight_type=QuantType.QInt8, per_channel=True, reduce_range=reduce_range)
                with open(out if quantized else path, "rb") as file:
                    return ort.InferenceSession(file.read(), options, providers=["CPUExecutionProvider"])

        array = {"x": x.numpy()}
        sessions = [session(layer) for layer in layers]
        return in_turn([lambda s=s: torch.from_numpy(s.run(None, array)[0]) for s in sessions])

    return build


RIVALS = {
    "torch fp32": Rival(torch_fp32),
    "ORT fp32": Rival(onnxruntime(False)),
    "torch dynamic FBGEMM 8 bit": Rival(torch_dynamic("fbgemm", False)),
    "torch dynamic FBGEMM 7 bit": Rival(torch_dynamic("fbgemm", True)),
    "torch dynamic oneDNN": Rival(torch_dynamic("onednn", False)),
    "ORT int8 8 bit": Rival(onnxruntime(True)),
    "ORT int8 7 bit": Rival(onnxruntime(True, reduce_range=True)),
    "pycompress": Rival(ours()),
    "pycompress asymmetric": Rival(ours(asymmetric=True)),
    "pycompress static": Rival(ours(x_scale="amax")),
    "pycompress avx2": Rival(ours("avx2"), env={"PYCOMPRESS_ISA": "avx2"}),
    # The same rivals held to AVX2, for the machines that have no more.
    "torch fp32 (AVX2)": Rival(torch_fp32, env={"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}),
    "torch dynamic FBGEMM 7 bit (AVX2)": Rival(torch_dynamic("fbgemm", True), env={"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}),
    "torch dynamic oneDNN (AVX2)": Rival(torch_dynamic("onednn", True), env={"ONEDNN_MAX_CPU_ISA": "AVX2"}),
}

if __name__ == "__main__":
    harness.run("int8_linear", cases=CASES, rivals=RIVALS, expected=expected, work=macs, baseline="torch fp32")
