"""int8 convolution, float in and out, against torch fp32, torch's static int8 engines and ONNX Runtime.

    python benchmarks/bench_int8_conv2d.py [--threads 2] [--rivals pycompress,ORT] [--cases 1x64] [--write]

Activations are random normal, weights and bias those of a fresh nn.Conv2d. Static scales come from the input itself.
"""

from __future__ import annotations

import functools
from typing import Any

import harness
import numpy as np
import torch
from harness import Rival


def case(n: int, c: int, h: int, o: int, k: int, stride: int = 1, groups: int = 1) -> dict[str, Any]:
    extra = (f" /{stride}" if stride > 1 else "") + (f" g{groups}" if groups > 1 else "")
    return {"name": f"{n}x{c}x{h} {o} {k}x{k}{extra}", "n": n, "c": c, "h": h, "o": o, "k": k, "stride": stride, "groups": groups}


CASES = [
    case(1, 64, 56, 64, 3),
    case(1, 128, 28, 128, 3),
    case(1, 256, 14, 256, 3),
    case(1, 256, 14, 1024, 1),
    case(8, 64, 56, 64, 3),
    case(1, 3, 224, 64, 7, stride=2),
    # beyond the table of the bars: the rest of ResNet-50 and MobileNetV2
    case(1, 512, 7, 512, 3),
    case(1, 128, 56, 128, 3, stride=2),
    case(1, 256, 56, 64, 1),
    case(1, 64, 56, 256, 1),
    case(8, 256, 14, 1024, 1),
    case(1, 3, 224, 32, 3, stride=2),
    case(1, 96, 112, 96, 3, stride=2, groups=96),
    case(1, 384, 14, 384, 3, groups=384),
    case(1, 128, 28, 128, 3, groups=32),
]


@functools.cache
def _layer(n, c, h, o, k, stride, groups) -> tuple[torch.Tensor, torch.nn.Conv2d]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(c, o, k, stride=stride, padding=k // 2, groups=groups)
        return torch.randn(n, c, h, h), conv.eval().requires_grad_(False)


def layer(case: dict[str, Any]) -> tuple[torch.Tensor, torch.nn.Conv2d]:
    return _layer(*(case[key] for key in ("n", "c", "h", "o", "k", "stride", "groups")))


def expected(case: dict[str, Any]) -> torch.Tensor:
    x, conv = layer(case)
    return conv(x)


def macs(case: dict[str, Any]) -> float:
    h = (case["h"] + 2 * (case["k"] // 2) - case["k"]) // case["stride"] + 1
    return case["n"] * case["o"] * h * h * case["c"] // case["groups"] * case["k"] ** 2


def torch_fp32(channels_last: bool):
    def build(case):
        x, conv = layer(case)
        if channels_last:
            x, conv = x.to(memory_format=torch.channels_last), conv.to(memory_format=torch.channels_last)
        return lambda: conv(x)

    return build


def ours(static: bool, channels_last: bool = False, kernel: str | None = None):
    def build(case):
        import pycompress as pc  # noqa: F401
        from pycompress.nn import Int8Conv2d

        x, conv = layer(case)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        quantized = Int8Conv2d.from_float(conv, x_scale=x.abs().max().item() / 127 if static else None)
        if kernel and quantized.kernel != kernel:
            raise RuntimeError(f"kernel {quantized.kernel} runs instead of {kernel}")
        return lambda: quantized(x)

    return build


def ours_chain(case):
    """int8 channels_last in and out, as between the convolutions of a residual block."""
    from pycompress.nn import Int8Conv2d

    x, conv = layer(case)
    y = conv(x)
    x_scale, out_scale = x.abs().max().item() / 127, y.abs().max().item() / 127
    quantized = Int8Conv2d.from_float(conv, x_scale=x_scale, out_scale=out_scale)
    q = (x / x_scale).round().clamp(-127, 127).to(torch.int8).to(memory_format=torch.channels_last)
    return lambda: quantized(q)


def _affine(x: torch.Tensor) -> tuple[float, int]:
    lo, hi = x.min().item(), x.max().item()
    scale = (hi - lo) / 255
    return scale, round(-lo / scale)


def torch_static(engine: str, chain: bool):
    """torch.ao static int8 by its operators: quantize_per_tensor, quantized::conv2d, dequantize (chain: the convolution alone)."""

    def build(case):
        torch.backends.quantized.engine = engine
        x, conv = layer(case)
        scales = (conv.weight.abs().amax(dim=(1, 2, 3)) / 127).double()
        weight = torch.quantize_per_channel(conv.weight, scales, torch.zeros(case["o"], dtype=torch.long), 0, torch.qint8)
        pads = [case["k"] // 2] * 2
        packed = torch.ops.quantized.conv2d_prepack(weight, conv.bias, [case["stride"]] * 2, pads, [1, 1], case["groups"])
        (xs, xz), (ys, yz) = _affine(x), _affine(conv(x))
        x = x.to(memory_format=torch.channels_last)
        if chain:
            q = torch.quantize_per_tensor(x, xs, xz, torch.quint8)
            return lambda: torch.ops.quantized.conv2d(q, packed, ys, yz)
        return lambda: torch.ops.quantized.conv2d(torch.quantize_per_tensor(x, xs, xz, torch.quint8), packed, ys, yz).dequantize()

    return build


def onednn_pt2e(case):
    """What torch.compile's int8 path calls: onednn.qconv_pointwise with a float result; the input is quantised by one operator."""
    x, conv = layer(case)
    scales = (conv.weight.abs().amax(dim=(1, 2, 3)) / 127).float()
    weight = (conv.weight / scales[:, None, None, None]).round().clamp(-127, 127).to(torch.int8)
    (xs, xz), zeros = _affine(x), torch.zeros(case["o"], dtype=torch.int32)
    stride, pads = [case["stride"]] * 2, [case["k"] // 2] * 2
    x = x.to(memory_format=torch.channels_last)
    packed = torch.ops.onednn.qconv_prepack(weight, scales, xs, xz, stride, pads, [1, 1], case["groups"], list(x.shape))

    def call():
        q = torch.quantize_per_tensor(x, xs, xz, torch.quint8).int_repr()
        return torch.ops.onednn.qconv_pointwise(
            q, xs, xz, packed, scales, zeros, conv.bias, stride, pads, [1, 1], case["groups"], 1.0, 0, torch.float32, "none", [], ""
        )

    return call


def _onnx_model(case, quantized: bool, reduce_range: bool) -> bytes:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    x, conv = layer(case)
    weight, bias = conv.weight.numpy(), conv.bias.numpy()
    attributes = {"kernel_shape": [case["k"]] * 2, "pads": [case["k"] // 2] * 4, "strides": [case["stride"]] * 2, "group": case["groups"]}
    tensors, nodes = {}, []
    if quantized:
        top = 63 if reduce_range else 127
        scales = np.abs(weight).max(axis=(1, 2, 3)) / top
        (xs, xz), (ys, yz) = _affine(x), _affine(conv(x))
        tensors = {
            "x_scale": np.float32(xs), "x_zero": np.uint8(xz), "y_scale": np.float32(ys), "y_zero": np.uint8(yz),
            "w": np.clip(np.rint(weight / scales[:, None, None, None]), -top, top).astype(np.int8),
            "w_scale": scales.astype(np.float32), "w_zero": np.zeros(case["o"], np.int8),
            "b": np.rint(bias / (scales * xs)).astype(np.int32), "b_scale": (scales * xs).astype(np.float32),
            "b_zero": np.zeros(case["o"], np.int32),
        }  # fmt: skip
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"], axis=0),
            helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["bd"], axis=0),
            helper.make_node("Conv", ["xd", "wd", "bd"], ["c"], **attributes),
            helper.make_node("QuantizeLinear", ["c", "y_scale", "y_zero"], ["cq"]),
            helper.make_node("DequantizeLinear", ["cq", "y_scale", "y_zero"], ["y"]),
        ]
    else:
        tensors = {"w": weight, "b": bias}
        nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    graph = helper.make_graph(
        nodes, "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(conv(x).shape))],
        initializers,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def onnxruntime(quantized: bool, reduce_range: bool = False):
    def build(case):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = ort.InferenceSession(_onnx_model(case, quantized, reduce_range), options, providers=["CPUExecutionProvider"])
        x, conv = layer(case)
        binding, y = session.io_binding(), torch.empty_like(conv(x))
        for bind, name, tensor in ((binding.bind_input, "x", x), (binding.bind_output, "y", y)):
            bind(name, "cpu", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())

        def call():
            session.run_with_iobinding(binding)
            return y

        return call

    return build


AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2", "PYCOMPRESS_ISA": "avx2"}

RIVALS = {
    "torch fp32": Rival(torch_fp32(False)),
    "torch fp32 channels_last": Rival(torch_fp32(True)),
    "ORT fp32": Rival(onnxruntime(False)),
    "FBGEMM static": Rival(torch_static("fbgemm", False)),
    "FBGEMM static q->q": Rival(torch_static("fbgemm", True), compare=False),
    "oneDNN static": Rival(torch_static("onednn", False)),
    "oneDNN static q->q": Rival(torch_static("onednn", True), compare=False),
    "oneDNN pt2e": Rival(onednn_pt2e),
    "ORT static int8": Rival(onnxruntime(True)),
    "pycompress dynamic": Rival(ours(False)),
    "pycompress static": Rival(ours(True)),
    "pycompress static channels_last": Rival(ours(True, True)),
    "pycompress static q->q": Rival(ours_chain, compare=False),
    # restricted to AVX2 where a rival can be (ONNX Runtime cannot)
    "torch fp32, avx2": Rival(torch_fp32(False), AVX2),
    "FBGEMM static, avx2": Rival(torch_static("fbgemm", False), AVX2),
    "oneDNN static, avx2": Rival(torch_static("onednn", False), AVX2),
    "pycompress dynamic, avx2": Rival(ours(False, kernel="avx2"), AVX2),
    "pycompress static, avx2": Rival(ours(True, kernel="avx2"), AVX2),
    "pycompress static channels_last, avx2": Rival(ours(True, True, kernel="avx2"), AVX2),
}


if __name__ == "__main__":
    harness.run("int8_conv2d", cases=CASES, rivals=RIVALS, expected=expected, work=macs, baseline="torch fp32")
