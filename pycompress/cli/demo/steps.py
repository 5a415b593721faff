"""The steps of the demo, in order, each through the library's public face."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import nn

from ... import Distiller, Int8Static, KDLoss, load, prune, quantize, report, save
from ...analysis import Report
from ...analysis.latency import torch_threads
from ...distillation import Ensemble
from ..interleave import interleaved
from .data import Digits, Shifted, Split, load_digits
from .models import student, teacher

BATCHES = (1, 256)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What a run depends on. Fewer epochs are for tests: the table then shows worse accuracy."""

    seed: int = 0
    threads: int = 1
    teachers: int = 3
    teacher_epochs: int = 20
    student_epochs: int = 40
    finetune_epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 3e-3
    pruned_channels: float = 0.5
    seconds_per_timing: float = 3.0


@dataclass(frozen=True)
class Row:
    """One model of the table. ``latency``: milliseconds by batch size; ``reports``: the facts per layer, also by batch size."""

    name: str
    accuracy: float
    wrong: int
    params: int
    file_bytes: int
    macs: int
    latency: dict[int, float]
    reports: dict[int, Report]


@dataclass(frozen=True)
class Bar:
    """Something the demo promises, with what came out."""

    text: str
    met: bool


@dataclass(frozen=True)
class Results:
    rows: dict[str, Row]
    settings: Settings
    held_out: int
    seconds: float

    def bars(self) -> list[Bar]:
        ensemble, distilled, pruned, int8 = (self.rows[key] for key in ("ensemble", "distilled", "pruned", "int8"))
        loss = 100 * (ensemble.accuracy - distilled.accuracy)
        ratio = ensemble.params / distilled.params
        drop = 100 * (pruned.accuracy - int8.accuracy)
        return [
            Bar(f"distilled student {_points(loss)} the ensemble (at most 1 point below)", loss <= 1.0),
            Bar(f"distilled student has {ratio:.1f}x fewer parameters (at least 20x)", ratio >= 20),
            Bar(f"int8 model {_points(drop)} its float model (at most 0.5 points below)", drop <= 0.5),
        ]


def _points(loss: float) -> str:
    if abs(loss) < 0.005:
        return "is as accurate as"
    return f"is {abs(loss):.2f} points {'below' if loss > 0 else 'above'}"


def run(settings: Settings, out: Path, say: Say) -> Results:
    """Train, distil, prune, quantize, save, reload, compare, measure."""
    start = perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    # One thread: these networks are too small to share, and the result does not depend on the number of cores.
    with torch_threads(1):
        digits = load_digits(settings.seed)
        parts = (digits.train, digits.validation, digits.held_out)
        say("digits: {} to train, {} to validate, {} held out".format(*(len(part.labels) for part in parts)))
        models = _train(digits, settings, say)
    names = {
        "ensemble": f"{settings.teachers} teachers (ensemble)",
        "alone": "student, trained alone",
        "distilled": "student, distilled",
        "pruned": f"+ {settings.pruned_channels:.0%} of the channels pruned",
        "int8": "+ int8",
    }
    files = {key: out / f"{key}.safetensors" for key in models}
    for key, model in models.items():
        save(model.eval(), files[key])
    say("saved; loading the int8 model back and comparing its outputs bit by bit")
    check_identical(models["int8"], load(files["int8"], student()), digits.held_out)
    say("measuring")
    latency = _latencies(models, digits.held_out, settings)
    rows = {}
    for key, model in models.items():
        wrong = count_wrong(model, digits.held_out)
        reports = {size: _facts(model, digits.held_out, size, settings) for size in BATCHES}
        rows[key] = Row(
            names[key],
            accuracy(wrong, digits.held_out),
            wrong,
            reports[1].params,
            os.path.getsize(files[key]),
            reports[1].macs,
            latency[key],
            reports,
        )
    return Results(rows, settings, len(digits.held_out.labels), perf_counter() - start)


def _train(digits: Digits, settings: Settings, say: Say) -> dict[str, nn.Module]:
    seed = settings.seed
    labels_only = KDLoss(soft_weight=0.0, hard_weight=1.0)
    from_ensemble = KDLoss(temperature=2.0, soft_weight=1.0, hard_weight=0.0)

    def fit(what: str, model: nn.Module, ensemble: nn.Module | None, loss: KDLoss, epochs: int, seed: int) -> None:
        start = perf_counter()
        train(model, ensemble, loss, digits, settings, epochs, seed)
        right = accuracy(count_wrong(model, digits.validation), digits.validation)
        say(f"{what}: {right:.1%} of the validation digits, {perf_counter() - start:.1f} s")

    members = []
    for number in range(settings.teachers):
        member = seeded(teacher, seed + number)
        fit(f"teacher {number + 1} of {settings.teachers}", member, None, labels_only, settings.teacher_epochs, seed + number)
        members.append(member)
    ensemble = Ensemble(members)

    alone = seeded(student, seed)
    distilled = copy.deepcopy(alone)
    fit("student alone, from the labels", alone, None, labels_only, settings.student_epochs, seed)
    fit("student distilled from the ensemble", distilled, ensemble, from_ensemble, settings.student_epochs, seed)

    example = digits.train.images[:2]
    head = next(name for name, layer in distilled.named_modules() if isinstance(layer, nn.Linear))
    pruned = prune(copy.deepcopy(distilled), example, pattern="channel", ratio=settings.pruned_channels, ignore=[head])
    fit(
        f"student without {settings.pruned_channels:.0%} of its channels, fine-tuned",
        pruned,
        ensemble,
        from_ensemble,
        settings.finetune_epochs,
        seed,
    )

    int8 = quantize(pruned, Int8Static(), data=digits.train.batches(100))
    say("quantized to int8, activation ranges from the training digits")
    return {"ensemble": ensemble, "alone": alone, "distilled": distilled, "pruned": pruned, "int8": int8}


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A new network with initial weights from ``seed``; the global generator stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def train(model: nn.Module, ensemble: nn.Module | None, loss: KDLoss, digits: Digits, settings: Settings, epochs: int, seed: int) -> None:
    """One-cycle AdamW on shifted digits; the epoch with the lowest validation loss is kept."""
    batches = Shifted(digits.train, settings.batch_size, seed)
    Distiller(model, ensemble, loss).fit(
        batches,
        epochs,
        val_loader=digits.validation.batches(len(digits.validation.labels)),
        metric="loss",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=settings.learning_rate),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=epochs * len(batches)
        ),
        scheduler_interval="step",
        seed=seed,
    )


@torch.no_grad()
def count_wrong(model: nn.Module, split: Split) -> int:
    return int((model.eval()(split.images).argmax(1) != split.labels).sum())


def accuracy(wrong: int, split: Split) -> float:
    return 1 - wrong / len(split.labels)


@torch.no_grad()
def check_identical(model: nn.Module, reloaded: nn.Module, split: Split) -> None:
    """Raises ``RuntimeError`` unless both give the same bits on every image."""
    if not torch.equal(model.eval()(split.images), reloaded.eval()(split.images)):
        raise RuntimeError("demo: the reloaded model must give the outputs of the saved one, got different ones; please report this")


def _latencies(models: dict[str, nn.Module], split: Split, settings: Settings) -> dict[str, dict[int, float]]:
    """Milliseconds per call, by model and batch size. Rounds are interleaved, so the ratios between models hold."""
    found: dict[str, dict[int, float]] = {key: {} for key in models}
    with torch_threads(settings.threads), torch.inference_mode():
        for size in BATCHES:
            calls = {key: partial(model.eval(), split.images[:size]) for key, model in models.items()}
            for key, seconds in interleaved(calls, settings.seconds_per_timing).items():
                found[key][size] = median(seconds) * 1e3
    return found


def _facts(model: nn.Module, split: Split, size: int, settings: Settings) -> Report:
    return report(model, split.images[:size], threads=settings.threads, budget=settings.seconds_per_timing / 10)
