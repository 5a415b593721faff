"""fit under DistributedDataParallel with two processes equals fit with one process on the joined batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from pycompress.distillation import Distiller, FeatureLoss, KDLoss

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
student = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
teacher = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
generator = torch.Generator().manual_seed(1)
data = TensorDataset(torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator))
val = TensorDataset(*(t[: 10 if rank == 0 else 3] for t in data.tensors))  # uneven on purpose
train = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, 2, rank, shuffle=False))
distiller = Distiller(nn.parallel.DistributedDataParallel(student), teacher, KDLoss() + FeatureLoss({"0": "0"}, "hint"))
options = dict(val_loader=DataLoader(val, batch_size=2), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
options["checkpoint"] = f"{folder}/run.safetensors"
distiller.fit(train, epochs=1, **options)
history = distiller.fit(train, epochs=2, resume=True, **options)
adapter = list(distiller.loss_module.parameters())
torch.save({"student": student.state_dict(), "adapter": adapter, "history": history.to_dict()}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == "win32", reason="needs gloo")
def test_two_processes_equal_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, tmp_path / "worker.py", str(r), str(tmp_path)], env=environment) for r in range(2)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]

    from pycompress.distillation import Distiller, FeatureLoss, KDLoss

    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
        teacher = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)
    order = [[8 * step + 2 * i + rank for i in range(4)] for step in range(4) for rank in range(2)]
    batches = [(x[order[2 * s] + order[2 * s + 1]], y[order[2 * s] + order[2 * s + 1]]) for s in range(4)]
    val = [(torch.cat([x[:10], x[:3]]), torch.cat([y[:10], y[:3]]))]
    distiller = Distiller(student, teacher, KDLoss() + FeatureLoss({"0": "0"}, "hint"))
    history = distiller.fit(batches, epochs=2, val_loader=val, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))

    for result in results:
        for key, value in student.state_dict().items():
            torch.testing.assert_close(result["student"][key], value, rtol=1e-4, atol=1e-6)
        for mine, theirs in zip(distiller.loss_module.parameters(), result["adapter"], strict=True):
            torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-6)
        for mine, theirs in zip(history.to_dict()["epochs"], result["history"]["epochs"], strict=True):
            assert theirs["metric"] == pytest.approx(mine["metric"])
            assert theirs["train_loss"] == pytest.approx(mine["train_loss"], rel=1e-4)


@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == "win32", reason="needs gloo")
def test_sharded_students_are_refused():
    dtensor = pytest.importorskip("torch.distributed.tensor")
    if not hasattr(dtensor, "distribute_tensor"):  # torch 2.4
        dtensor = pytest.importorskip("torch.distributed._tensor")
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from pycompress.distillation import Distiller

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        student = nn.Linear(4, 3)
        mesh = init_device_mesh("cpu", (1,))
        student.weight = nn.Parameter(dtensor.distribute_tensor(student.weight.detach(), mesh, [dtensor.Shard(0)]))
        with pytest.raises(ValueError, match=r"fit: students must be whole models or wrapped in DistributedDataParallel, got sharded ones"):
            Distiller(student, nn.Linear(4, 3)).fit([(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))], 1)
    finally:
        dist.destroy_process_group()
