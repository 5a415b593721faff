"""Randomness that a seed fixes and that leaves the caller's generators untouched."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def isolated_rng(device: torch.device) -> Iterator[None]:
    """Restore the global generators (Python, NumPy, torch CPU, the given CUDA device) when the block ends."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


def seed_all(device: torch.device, *key: int) -> None:
    """Seed those generators from a tuple of non-negative integers such as (seed, epoch, rank).

    Seeding each epoch by its number makes an epoch's randomness independent of what ran before it, so a resumed run needs
    no saved generator state to be bit-identical.
    """
    words = np.random.SeedSequence(key).generate_state(3, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(int(words[2]))


def loader_generators(loader: Any) -> list[torch.Generator]:
    """Generators that a DataLoader owns, each once. They advance from epoch to epoch, so checkpoints keep them."""
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found: list[torch.Generator] = []
    for owner in owners:
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and not any(generator is other for other in found):
            found.append(generator)
    return found
