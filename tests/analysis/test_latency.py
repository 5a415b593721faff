from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from pycompress.analysis import Latency, measure, measure_latency, measure_layers


def test_quartiles():
    latency = Latency.of([4.0, 1.0, 3.0, 2.0, 100.0])
    assert (latency.q25, latency.median, latency.q75, latency.iqr, latency.runs) == (2.0, 3.0, 4.0, 2.0, 5)
    assert str(Latency(0.00123456, 0.001, 0.002, 7)) == "1.235 ms (1 to 2, 7 runs)"
    with pytest.raises(ValueError, match="seconds must not be empty"):
        Latency.of([])


def test_measure_warms_up_and_stays_in_its_budget():
    calls = []
    latency = measure(lambda: calls.append(time.sleep(0.002)), warmup=4, budget=0.05)
    assert len(calls) == latency.runs + 4
    assert 3 <= latency.runs <= 25
    assert 0.002 <= latency.q25 <= latency.median <= latency.q75


def test_measure_runs_a_slow_call_the_least_number_of_times():
    calls = []
    latency = measure(lambda: calls.append(time.sleep(0.01)), warmup=50, budget=0, min_runs=2)
    assert latency.runs == 2
    assert len(calls) == 3, "one warm-up call has used up the budget"


def test_threads_are_set_for_the_measurement_only():
    before = torch.get_num_threads()
    seen = set()
    measure(lambda: seen.add(torch.get_num_threads()), threads=before + 1, budget=0)
    assert seen == {before + 1}
    assert torch.get_num_threads() == before

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        measure(fail, threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "options, text",
    [
        ({"warmup": -1}, "measure: warmup must be a non-negative integer, got -1"),
        ({"budget": float("nan")}, "measure: budget must be a non-negative number of seconds, got nan"),
        ({"threads": 0}, "measure: threads must be a positive integer or None, got 0"),
        ({"min_runs": 0}, "measure: min_runs must be a positive integer, got 0"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        measure(lambda: None, **options)


class Clock:
    """A clock that only the layers move, so a busy machine cannot fail the test."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for module in ("latency", "layer_latency"):
            monkeypatch.setattr(f"pycompress.analysis.{module}.perf_counter", lambda: self.now)


class Slow(nn.Module):
    def __init__(self, clock, seconds, inner=None):
        super().__init__()
        self.clock, self.seconds, self.inner = clock, seconds, inner

    def forward(self, x):
        self.clock.now += self.seconds
        return x if self.inner is None else self.inner(x)


def test_layer_times_are_each_layers_own(monkeypatch):
    clock = Clock(monkeypatch)
    inner = Slow(clock, 0.004)
    model = nn.Sequential(Slow(clock, 0.002, inner), inner, Slow(clock, 0.003))
    times, other = measure_layers(model, torch.zeros(1), {"outer": model[0], "inner": inner, "never": nn.Linear(1, 1)}, budget=0.1)
    assert set(times) == {"outer", "inner"}
    assert times["outer"].median == pytest.approx(0.002), "the time of the inner layer is not the outer one's"
    assert times["inner"].median == pytest.approx(0.008), "two calls"
    assert other.median == pytest.approx(0.003)
    assert times["inner"].runs == other.runs >= 3


def test_measure_latency_runs_the_model_in_evaluation_mode():
    class Spy(nn.Module):
        def forward(self, x, *, y):
            seen.add((self.training, torch.is_grad_enabled(), x, y))

    seen = set()
    model = Spy()
    measure_latency(model, {"x": 1, "y": 2}, budget=0)
    assert seen == {(False, False, 1, 2)}
    assert model.training
