"""Checks of the shape of samples."""

from collections.abc import Sequence


def check_halvings(shape: Sequence[int], levels: int) -> None:
    """Raise `ValueError` unless images of `shape` (C, H, W) can be halved `levels` times."""
    if len(shape) != 3 or shape[1] % 2**levels or shape[2] % 2**levels:
        raise ValueError(
            f"samples of shape {tuple(shape)} cannot be halved {levels} times; "
            f"use fewer levels, or sides that are multiples of {2**levels}"
        )
