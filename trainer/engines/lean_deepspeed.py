"""Import DeepSpeed without what it imports for features that nobody here uses, 3 s of every worker's start.

Its autotuner takes MLflow along, and its Muon optimiser, compiled by decorator, takes torch's compiler along. The op that it would
compile at its first use is loaded as set-up has built it (`trainer/engines/prebuild.py`).
"""

import importlib.util
import os
import sys
from pathlib import Path
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

OP = "deepspeed_shm_comm"
BUILT = Path(sys.prefix) / "deepspeed_ops" / f"torch-{torch.__version__}-deepspeed-{deepspeed.__version__}" / OP
"""Where set-up leaves the op. Each environment has its own: in torch's common folder two environments build over each other by turns."""


def _load_built() -> None:
    """Have the built op where DeepSpeed looks first. On its own way it asks ninja, under a lock that a killed worker leaves behind for ever."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    spec = importlib.util.spec_from_file_location(OP, BUILT / f"{OP}.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    OpBuilder._loaded_ops[OP] = module


if BUILT.exists() and os.environ["DS_ACCELERATOR"] == "cpu":
    _load_built()

__all__ = ["BUILT", "OP", "deepspeed"]
