"""The folder that holds the five packages: the checkout, or the place where an installed wheel lies."""

from pathlib import Path

import trainer

CHECKOUT = Path(trainer.__file__).parents[1]
"""Found from the package and not from this module, so that it stays right wherever a module moves to."""
