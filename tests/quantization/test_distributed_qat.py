"""Quantization-aware training under DistributedDataParallel with two processes, and under torch.compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.quantizable import mlp, normal

from pycompress.nn import Int8Linear
from pycompress.quantization import Int8Dynamic, Int8Static, Quantizer

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from pycompress.quantization import Int8Static, Quantizer

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
found = {}
for qat in ("ste", "lsq"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    quantizer = Quantizer(Int8Static(observer="moving_average"))
    model = quantizer.prepare(model, torch.zeros(1, 6), qat=qat)
    quantizer.calibrate(model, [torch.randn(16, 6, generator=torch.Generator().manual_seed(rank))])  # each rank its own data
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    parallel.train()
    for step in range(5):
        # Ten times larger on rank 1: unsynchronized ranges would drift apart at once.
        x = (1 + 9 * rank) * torch.randn(8, 6, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(parallel(x), torch.arange(8) % 3).backward()
        optimizer.step()
    found[qat] = model.state_dict()
    converted = quantizer.convert(model.eval())
    assert torch.isfinite(converted(x)).all()
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == "win32", reason="needs gloo")
def test_two_processes_train_one_model(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, tmp_path / "worker.py", str(r), str(tmp_path)], env=environment) for r in range(2)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for qat in ("ste", "lsq"):
        for name, value in first[qat].items():
            if name.endswith(("original", "bias")) or qat == "lsq":
                assert torch.equal(value, second[qat][name]), name
    # After the last synchronization each rank took one step of 1 % towards its own batch, and no more.
    ranges = [found["ste"]["0.input_quantizer.observer.high"] for found in (first, second)]
    assert 0 < float((ranges[1] - ranges[0]).abs()) < 0.5


@pytest.mark.parametrize(
    ("config", "qat"), [(Int8Dynamic(), "ste"), (Int8Static(observer="moving_average"), "lsq")], ids=["dynamic", "static"]
)
def test_compiled_training_equals_eager(config, qat):
    quantizer = Quantizer(config)
    x, y = normal(16, 7), torch.arange(16) % 3
    losses = []
    for compiled in (False, True):
        model = quantizer.prepare(mlp(), x, qat=qat)
        quantizer.calibrate(model, [x])
        run = torch.compile(model.train(), backend="aot_eager") if compiled else model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(run(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        converted = quantizer.convert(model.eval())
        assert isinstance(converted[0], Int8Linear)
    torch.testing.assert_close(losses[:3], losses[3:], rtol=1e-4, atol=1e-5)
