"""Images in a fixed order, without lanes: the held-out set, and sets for metrics and classifiers.

Legend: N images, M images of a micro-batch, C channels, H height, W width.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

from data.config import ImageConfig
from data.images.decode import StoredImage
from data.images.records import ImageRecords, Images
from data.lanes.rows import scan
from data.share import Batch
from data.sources.kinds import Plain

if TYPE_CHECKING:
    import torch

Split = Literal["train", "held_out"]


def held_out_images(config: ImageConfig, *, rank: int, world: int, micro_batch: int) -> list[Batch]:
    """This rank's held-out images, in as many batches as every other rank has.

    A batch has "image" uint8 (m, C, H, W); "label" int64 (m,); "sample" int64 (m,), the index among
    the held-out images; and "mask" bool (m,), which is false for padding in the last batches.

    Empty without `held_out` and `eval_source`. Raises ValueError if no image is held out.
    """
    import torch

    if config.eval_source is None and config.held_out == 0.0:
        return []
    image_NCHW, label_N = image_set(config, "held_out", config.max_eval_samples)
    count = -(-len(label_N) // (world * micro_batch))
    starts = (torch.arange(count) * world + rank) * micro_batch
    batches: list[Batch] = []
    for index_M in starts[:, None] + torch.arange(micro_batch):
        real_M = index_M < len(label_N)
        kept_M = index_M.where(real_M, 0)
        batches.append(
            {"image": image_NCHW[kept_M], "label": label_N[kept_M], "sample": index_M.clone(), "mask": real_M}
        )
    return batches


def image_set(
    config: ImageConfig, split: Split = "train", limit: int | None = None
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """The first `limit` images of a split, or all: (images (N, C, H, W) uint8, labels (N,) int64).

    Their order depends only on the source. Raises ValueError if the split is empty.
    """
    import torch

    decoded = ImageRecords(config)
    skip = config.on_unreadable == "skip"
    parts = []
    left = limit
    for images in _stored(config, split):
        parts.append(decoded.of(images[:left], skip=skip))
        if left is not None:
            left -= len(parts[-1])
            if left == 0:
                break
    if not parts:
        larger = "use a larger share, or name run.objective.data.eval_source"
        fix = larger if split == "held_out" else "use a smaller share, or more data"
        problem = f"{config.held_out}: no image of the source falls into the {split} share"
        raise ValueError(f"run.objective.data.held_out: {problem}; {fix}")
    records = np.concatenate(parts)
    return torch.from_numpy(records["image"].copy()), torch.from_numpy(records["label"].copy())


def _stored(config: ImageConfig, split: Split) -> Iterator[list[StoredImage]]:
    """The images of a split, table by table."""
    images = Images(config, held_out=config.training_held_out)
    source = config.source
    columns: Callable[[Plain], list[str]] = config.columns
    choose = images.training if split == "train" else images.held_out
    if split == "held_out" and config.eval_source:
        source = config.eval_source
        columns = lambda _: config.eval_columns  # noqa: E731
        choose = images.all
    skip = config.on_unreadable == "skip"
    for table, origin, _ in scan(source, columns, retry_seconds=config.retry_seconds, skip=skip):
        if chosen := choose(table, origin):
            yield chosen
