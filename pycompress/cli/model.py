"""What a user names on the command line, made into a model and its inputs."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor, nn


def open_model(source: str, skeleton: str | None) -> nn.Module:
    """``module:name`` (a module, or a function without arguments that makes one) or a file that ``pycompress.save`` wrote.

    A file needs the uncompressed architecture as ``skeleton``, itself a ``module:name``.
    """
    if Path(source).is_file():
        from .. import load

        if skeleton is None:
            raise typer.BadParameter(f"{source} holds weights only; give the architecture with --skeleton module:factory")
        try:
            return load(source, _imported(skeleton))
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            raise typer.BadParameter(f"{source}: {error}") from error
    if skeleton is not None:
        raise typer.BadParameter(f"--skeleton goes with a saved file, and {source!r} is none")
    return _imported(source)


def _imported(spec: str) -> nn.Module:
    from torch import nn

    from ..io.structure import first_line

    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise typer.BadParameter(f"expected an existing file or module:factory, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` would: the user's own module lies in the working folder
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"{spec!r}: {error}") from error
    except Exception as error:  # whatever the user's own module does when it is imported
        raise typer.BadParameter(f"importing {spec!r} raised {first_line(error)}") from error
    try:
        model = found if isinstance(found, nn.Module) else found()
    except Exception as error:  # it is the user's own function
        raise typer.BadParameter(f"calling {spec!r} raised {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise typer.BadParameter(f"{spec!r} must be or return a torch.nn.Module, got {type(model).__name__}")
    return model.eval()


def make_inputs(shapes: list[str], seed: int) -> tuple[Tensor, ...]:
    """Normal float32 tensors of the given shapes ("1,3,224,224"), or token ids below a bound for "ids:1,128:30000"."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for text in shapes:
        kind, _, rest = text.rpartition("ids:")
        dims, _, bound = rest.partition(":") if "ids:" in text else (text, "", "")
        try:
            shape = [int(part) for part in dims.split(",")]
            vocabulary = int(bound) if bound else 2
            if kind or min(shape) < 1 or vocabulary < 1:
                raise ValueError
        except ValueError:
            raise typer.BadParameter(f"expected a shape such as 1,3,224,224 or ids:1,128:30000, got {text!r}") from None
        if "ids:" in text:
            inputs.append(torch.randint(vocabulary, shape, generator=generator))
        else:
            inputs.append(torch.randn(shape, generator=generator))
    return tuple(inputs)


def check_runs(model: nn.Module, inputs: tuple[Tensor, ...], shapes: list[str]) -> None:
    """Run the model once, so that inputs it rejects (a wrong size, ids beyond its vocabulary) are an error of the command line."""
    from ..io.structure import first_line
    from ..nn.untouched import untouched

    try:
        with untouched(model):
            model(*inputs)
    except Exception as error:  # whatever the user's model makes of them
        raise typer.BadParameter(f"the model does not run on --input {' '.join(shapes)}: {first_line(error)}") from error


def check_writable(option: str, path: Path) -> None:
    """Refuse, before anything takes time, a file that could not be written in the end."""
    if path.is_dir():
        raise typer.BadParameter(f"{option} must be a file, {path} is a folder")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{option} {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise typer.BadParameter(f"{option} {path}: the folder {path.parent} cannot be written to")
