"""Import DeepSpeed without what it imports for features that nobody here uses, 3 s of every worker's start.

Its autotuner takes MLflow along, and its Muon optimiser, compiled by decorator, takes torch's compiler along.
"""

import os
import sys
from typing import Any

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def _uncompiled(function: Any = None, **options: Any) -> Any:
    return function if function is not None else lambda inner: inner


_absent, _compile = "mlflow" not in sys.modules, torch.compile
if _absent:
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # DeepSpeed catches the ImportError
torch.compile = _uncompiled  # type: ignore[assignment]
try:
    import deepspeed
    import deepspeed.runtime.zero.muon.original_muon
finally:
    torch.compile = _compile
    if _absent:
        del sys.modules["mlflow"]

__all__ = ["deepspeed"]
