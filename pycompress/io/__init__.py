"""Models in files, without pickle."""

from .manifest import CheckpointError
from .reader import load, read_manifest
from .writer import save

__all__ = ["CheckpointError", "load", "read_manifest", "save"]
