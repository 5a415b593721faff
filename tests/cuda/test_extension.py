"""Which devices the CUDA extension serves: pure functions, no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pycompress import doctor
from pycompress.ops import kd_loss
from pycompress.ops.cuda import extension
from pycompress.ops.cuda import kd_loss as cuda_kd_loss


@pytest.mark.parametrize(
    ("capability", "driver", "runtime", "text"),
    [
        ((9, 0), 13000, 13000, None),
        ((8, 0), 13010, 13000, None),
        ((12, 0), 13000, 13020, None),  # minor versions are compatible
        ((7, 5), 13000, 13000, "compute capability 7.5, the kernels need 8.0"),
        ((9, 0), 12080, 13000, "a driver for CUDA 12.8, the kernels were built with 13.0"),
        ((9, 0), 0, 13000, "a driver for CUDA 0.0"),
    ],
)
def test_reasons(capability, driver, runtime, text):
    reason = extension.unsupported_reason(capability, driver, runtime)
    assert reason is None if text is None else text in reason


def test_the_documents_say_what_has_not_run():
    """Every op that the doctor lists is on the page that says that nothing on it has run on a GPU."""
    page = (Path(__file__).parents[2] / "docs" / "cuda.md").read_text()
    assert "**No kernel on this page has run on a GPU yet.**" in page and "not yet run on a GPU" in doctor.CUDA_STATE
    assert [op for op in doctor.CUDA_OPS if f"`{op}`" not in page] == []


@pytest.mark.skipif(extension.module is not None, reason="the extension is there")
def test_a_missing_extension_says_how_to_get_it(monkeypatch):
    assert "PYCOMPRESS_" in extension.missing_reason
    assert extension.unsupported(0) == extension.missing_reason


def test_kernel_cuda_is_for_cuda_tensors():
    with pytest.raises(ValueError, match=r"kd_loss: kernel must be one of .* got 'cuda'"):
        kd_loss(torch.randn(2, 3), torch.randn(2, 3), temperature=1.0, soft_weight=1.0, hard_weight=0.0, kernel="cuda")


def test_the_graph_runs_once():
    class Context:
        pass

    context = Context()
    cuda_kd_loss.scale_once("kd_loss", context, [None], torch.ones(()))
    with pytest.raises(RuntimeError, match="kd_loss: on CUDA the graph can be used only once"):
        cuda_kd_loss.scale_once("kd_loss", context, [None], torch.ones(()))
