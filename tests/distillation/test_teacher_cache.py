"""TeacherCache: the same training as with the teacher itself, whole or top-k, in memory or in a file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pycompress.distillation import Distiller, KDLoss, TeacherCache


def test_training_from_the_cache_equals_training_with_the_teacher(mlp, digits, teacher, is_same_state):
    dataset = TensorDataset(digits[0][:150], digits[1][:150])
    cache = TeacherCache.build(teacher, dataset, batch_size=64)
    assert len(cache) == 150 and cache.num_bytes == 150 * 10 * 4
    live, cached = mlp(8), mlp(8)
    Distiller(live, teacher).fit(DataLoader(dataset, 50, shuffle=True), 2)
    Distiller(cached, None).fit(DataLoader(cache.attach(dataset), 50, shuffle=True), 2)
    # the teacher saw batches of 64 there and of 50 here: equal up to the rounding of a matmul
    for a, b in zip(live.parameters(), cached.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_top_k_keeps_the_top_and_spreads_the_rest(digits, teacher):
    x = digits[0][:20]
    dataset = TensorDataset(x)
    cache = TeacherCache.build(teacher, dataset, top_k=3)
    with torch.no_grad():
        exact = teacher(x).softmax(-1)
    for i in range(20):
        kept = cache[i].softmax(-1)
        order = exact[i].argsort(descending=True)
        torch.testing.assert_close(kept[order[:3]], exact[i][order[:3]], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(kept[order[3:]], exact[i][order[3:]].mean().expand(7), rtol=1e-2, atol=2e-7)
    assert cache.num_bytes == 20 * 3 * 8
    assert TeacherCache.build(teacher, dataset, top_k=10).ids is None


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_file_round_trip(tmp_path, digits, teacher, top_k, dtype):
    cache = TeacherCache.build(teacher, TensorDataset(digits[0][:30]), top_k=top_k, dtype=dtype)
    cache.save(tmp_path / "t.safetensors")
    loaded = TeacherCache.load(tmp_path / "t.safetensors")
    assert all(torch.equal(cache[i], loaded[i]) for i in range(30)) and loaded.num_bytes == cache.num_bytes
    assert cache[0].dtype == torch.float32 and loaded.values.dtype == dtype
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    assert repr(cache) == repr(loaded) and "30 samples" in repr(cache)


def test_attach_keeps_every_kind_of_sample(teacher, digits):
    x, y = digits[0][:4], digits[1][:4]
    cache = TeacherCache.build(teacher, TensorDataset(x))
    kinds = {
        "tensor": list(x),
        "one": TensorDataset(x),
        "pair": TensorDataset(x, y),
        "mapping": [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)],
    }
    for kind, dataset in kinds.items():
        sample = cache.attach(dataset)[2]
        assert torch.equal(sample["teacher_logits"], cache[2])
        assert torch.equal(sample["x" if kind == "mapping" else "inputs"], x[2])
        assert ("labels" in sample) == (kind in ("pair", "mapping"))
    with pytest.raises(ValueError, match=r"TeacherCache: samples must be inputs, .* got 3 entries"):
        cache.attach(TensorDataset(x, x, y))[0]
    with pytest.raises(ValueError, match=r"TeacherCache\.attach: dataset must have the 4 samples of the cache, got 3"):
        cache.attach(TensorDataset(x[:3]))


def test_samples_that_attach_would_refuse_are_refused_before_the_teacher_runs(digits):
    class Refuses(nn.Module):
        def forward(self, *args):
            raise AssertionError("the teacher ran")

    x, y = digits[0][:4], digits[1][:4]
    with pytest.raises(ValueError, match=r"TeacherCache: samples must be inputs, \(inputs, labels\) or a mapping, got 3 entries"):
        TeacherCache.build(Refuses(), TensorDataset(x, x, y))


def test_sequences_and_the_random_state():
    model, tokens = nn.Embedding(11, 7), torch.randint(11, (5, 3))
    state = torch.get_rng_state()
    cache = TeacherCache.build(model, TensorDataset(tokens), batch_size=2, top_k=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert cache[0].shape == (3, 7)
    loader = DataLoader(cache.attach(TensorDataset(tokens)), batch_size=5)
    assert Distiller(nn.Embedding(11, 7), None, KDLoss(1.0, 1.0, 0.0)).loss(next(iter(loader))).isfinite()


def test_build_errors(teacher, digits):
    dataset = TensorDataset(digits[0][:4])
    for arguments, options, error, message in [
        (("teacher", dataset), {}, TypeError, "TeacherCache.build: teacher must be a torch module, got str"),
        ((teacher, []), {}, ValueError, "TeacherCache.build: dataset must hold at least one sample, got none"),
        ((teacher, dataset), {"top_k": 0}, ValueError, "TeacherCache.build: top_k must be a positive integer, got 0"),
        ((teacher, dataset), {"top_k": 11}, ValueError, "TeacherCache.build: top_k must be at most the number of classes 10, got 11"),
        ((teacher, dataset), {"dtype": torch.int8}, ValueError, "TeacherCache.build: dtype must be a floating-point type, got torch.int8"),
        (
            (nn.Embedding(3, 2), [torch.zeros(2, dtype=torch.long), torch.zeros(3, dtype=torch.long)]),
            {"batch_size": 1},
            ValueError,
            r"TeacherCache.build: every sample must have logits of shape \(2, 2\), got \(3, 2\); pad to one length",
        ),
    ]:
        with pytest.raises(error, match=message):
            TeacherCache.build(*arguments, **options)


def test_hostile_files(tmp_path):
    path = tmp_path / "t.safetensors"
    header = {"format": "pycompress-teacher-cache-1", "classes": "5"}
    for tensors, metadata, message in [
        ({"values": torch.zeros(2, 5)}, None, "its format is None"),
        ({"values": torch.zeros(2, 4)}, header, r"its values are \(2, 4\), expected 5 classes"),
        ({"values": torch.zeros(2, 5).int()}, header, "its values are torch.int32"),
        ({"values": torch.zeros(2, 2), "ids": torch.full((2, 2), 5)}, header, "its class numbers do not fit its values"),
        ({"values": torch.zeros(2, 2), "ids": torch.zeros(2, 3).int()}, header, "its class numbers do not fit its values"),
        ({"other": torch.zeros(1)}, header, "values"),
        ({"values": torch.zeros(2, 5)}, header | {"classes": "many"}, "invalid literal"),
    ]:
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError, match=rf"TeacherCache.load: .* is not a usable teacher cache: .*{message}"):
            TeacherCache.load(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="is not a usable teacher cache"):
        TeacherCache.load(path)
