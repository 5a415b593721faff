"""Post-training algorithms: one file each, one import line here."""

from .base import ALGORITHMS, Algorithm, check_algorithms

__all__ = ["ALGORITHMS", "Algorithm", "check_algorithms"]
