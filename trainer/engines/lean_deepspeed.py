"""Imports DeepSpeed without its unused optional parts, which saves 3 s at every worker start.

Its autotuner would import MLflow, and its Muon optimiser, compiled by a decorator, would import
torch's compiler. The op that DeepSpeed would compile at its first use is loaded from the build that
set-up made (`trainer/engines/prebuild.py`).
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def _uncompiled(function: object = None, **options: object) -> object:
    """Stands in for `torch.compile`, as a decorator with or without arguments."""
    return function if function is not None else lambda inner: inner


_mlflow_absent = "mlflow" not in sys.modules
_compile = torch.compile
if _mlflow_absent:
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # DeepSpeed catches the ImportError
torch.compile = _uncompiled  # type: ignore[assignment]
try:
    import deepspeed
    import deepspeed.runtime.zero.muon.original_muon
finally:
    torch.compile = _compile
    if _mlflow_absent:
        del sys.modules["mlflow"]

OP = "deepspeed_shm_comm"
BUILT = Path(sys.prefix) / "deepspeed_ops" / f"torch-{torch.__version__}-deepspeed-{deepspeed.__version__}" / OP
"""The folder in which set-up leaves the op.

Every environment has its own. In torch's common folder, two environments would overwrite each
other's builds.
"""


def _load_built() -> None:
    """Load the built op and enter it where DeepSpeed looks first.

    DeepSpeed would otherwise call ninja, under a lock that a killed worker never releases.
    """
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
