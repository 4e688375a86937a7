"""The folder that holds the five packages: a checkout, or the place of an installed wheel."""

from pathlib import Path

import trainer

CHECKOUT = Path(trainer.__file__).parents[1]
"""Derived from the package instead of this module, so that it survives a move of the module."""
