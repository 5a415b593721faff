"""One of two processes that train and prune one model (started by test_distributed.py): RANK, and a folder to meet and report in."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pycompress.pruning import Pruner

rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
result = {}
for criterion in ("wanda", "taylor"):
    for pattern in ("unstructured", "channel"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
        x, y = torch.randn(2, 16, 6), torch.randint(4, (2, 16))
        x[1] *= torch.tensor([9.0, 1, 1, 1, 0.1, 0.1])  # so that the ranks would choose differently on their own
        pruner = Pruner(model, x[0], pattern=pattern, ratio=0.5, criterion=criterion, steps=2)
        for _ in range(2):
            parallel = DistributedDataParallel(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            F.cross_entropy(parallel(x[rank]), y[rank]).backward()
            optimizer.step()
            alone = {name: value.clone() for name, value in pruner._statistics.sums["input_squares"].items()}
            pruner.step()
        result[criterion, pattern] = {"weights": pruner.convert().state_dict(), "alone": alone}
torch.save(result, folder / f"{rank}.pt")
dist.destroy_process_group()
