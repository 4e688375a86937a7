"""How long a save keeps training waiting, next to a blocking `torch.save` of the same state.

    python tests/bench/checkpoint.py [--json FILE] [--rounds 5] [--parameters 200000000]

Our save copies the state and writes it in the background. The state is that of AdamW in fp32:
weights and both moments, 12 bytes per parameter, in one process. The first save, which allocates
its buffers, does not count. Each save starts when the one before is published, as in a run whose
checkpoints are far enough apart. The cost of the writing to training is shown too: matrix products
on one thread while nothing is written, and while a checkpoint is.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from paired import arguments, ratio, show, write
from torch import Tensor

from trainer.checkpoint.fragments import MOMENTS, Fragment
from trainer.checkpoint.save import CheckpointConfig, Checkpointer
from trainer.storage import Folder
from trainer.world import joined

_LAYER = 7_077_888
"""Parameters of a tensor: one layer of GPT-2 small."""


def state_of(parameters: int) -> list[Fragment]:
    """Weights and moments, in tensors of the size of a layer."""
    sizes = [min(_LAYER, parameters - start) for start in range(0, parameters, _LAYER)]
    return [
        Fragment(f"model/layer-{index}", kind, (size,), 0, torch.randn(size), slice(0, size))
        for index, size in enumerate(sizes)
        for kind in ("weight", *MOMENTS)
    ]


def products_for(busy: Any) -> float:
    """Seconds of a matrix product, the median while `busy()` holds, at least three."""
    x = torch.randn(768, 768)
    seconds = []
    while busy() or len(seconds) < 3:
        begin = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--parameters", type=int, default=200_000_000, help="default: 200000000")
    options = parser.parse_args()
    samples: dict[str, list[float]] = {"ours, training waits": [], "torch.save": [], "ours, until published": []}
    product: dict[str, list[float]] = {"alone": [], "beside a save": []}
    with joined("cpu", threads=1) as world, tempfile.TemporaryDirectory(dir=".") as scratch:
        fragments = state_of(options.parameters)
        tensors: dict[str, Tensor] = {fragment.key: fragment.values for fragment in fragments}
        checkpointer = Checkpointer(
            Folder(str(Path(scratch).absolute())).make(), world, CheckpointConfig(keep=1), attempt=0
        )
        for index in range(options.rounds + 1):
            begin = time.perf_counter()
            checkpointer.save(index + 1, fragments, {})
            stall = time.perf_counter() - begin
            assert checkpointer.thread is not None
            beside = products_for(checkpointer.thread.is_alive)
            checkpointer.wait()
            published = time.perf_counter() - begin
            end = time.perf_counter() + 1
            alone = products_for(lambda: time.perf_counter() < end)  # noqa: B023
            begin = time.perf_counter()
            torch.save(tensors, f"{scratch}/blocking.pt")
            blocking = time.perf_counter() - begin
            if index:
                for values, value in zip(
                    (*samples.values(), *product.values()), (stall, blocking, published, alone, beside), strict=True
                ):
                    values.append(value)
    show(samples)
    share = ratio(samples["ours, training waits"], samples["torch.save"])
    slower = ratio(product["beside a save"], product["alone"])
    print(
        f"training waits for {100 * share:.1f} % of the time of a blocking torch.save; "
        f"a matrix product during a save takes {slower:.2f} times as long"
    )
    write(
        options.json,
        {
            "ratio": share,
            "seconds": samples,
            "product_seconds": product,
            "product_ratio": slower,
            "parameters": options.parameters,
        },
    )


if __name__ == "__main__":
    main()
