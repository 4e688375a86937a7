"""Builds the op that DeepSpeed would compile at its first use, so that no run waits for it.

Set-up calls `python -m trainer.engines.prebuild`.
"""

import os
import tempfile
from pathlib import Path

from torch import nn

from trainer.engines import build_engine
from trainer.engines.config import DeepSpeedConfig
from trainer.engines.lean_deepspeed import BUILT, OP
from trainer.engines.optim import OptimizerConfig
from trainer.world import joined


def main() -> None:
    """Start DeepSpeed once, in a world of one, and keep the op that it compiled.

    One rename publishes the folder, so it is complete or absent.
    """
    if BUILT.exists():
        return
    BUILT.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILT.parent) as scratch, joined() as world:
        os.environ["TORCH_EXTENSIONS_DIR"] = scratch
        build_engine(DeepSpeedConfig(), nn.Linear(4, 4).to(world.device), OptimizerConfig(), bf16=False, world=world)
        built = Path(scratch) / OP
        if built.exists():  # DeepSpeed does not have this op on every platform
            built.rename(BUILT)


if __name__ == "__main__":
    main()
