"""The training stream of one rank, for images."""

from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from data.batches import Batch, RunState, Share
from data.config import ImageConfig
from data.images.records import ImageRecords, Images, Records
from data.lanes.lane import Samples
from data.lanes.rows import scan
from data.lanes.shuffle import splitmix64, stable_hash
from data.training_stream import RunStream

if TYPE_CHECKING:
    import torch


class ImageCollate:
    """Records to {"image": uint8 (m, C, H, W), "label": int64 (m,), "sample": int64 (m,)}."""

    def __init__(self, *, flip_seed: int | None) -> None:
        self.flip_key = None if flip_seed is None else np.uint64(stable_hash(flip_seed, "flip"))

    def room(self, count: int, like: Samples) -> Samples:
        return np.empty(count, like.dtype)

    def batch(self, samples: Samples, numbers: npt.NDArray[np.int64]) -> Batch:
        import torch

        records = cast(Records, samples)
        image_MCHW = records["image"].copy()
        if self.flip_key is not None:
            flipped_M = splitmix64(splitmix64(numbers.astype(np.uint64)) ^ self.flip_key) >> np.uint64(63) == 1
            image_MCHW[flipped_M] = image_MCHW[flipped_M, :, :, ::-1]
        arrays = {"image": image_MCHW, "label": records["label"].copy(), "sample": numbers}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class ImageStream(RunStream):
    """The training batches of one rank, of images (run_stream.py)."""

    def __init__(self, config: ImageConfig, share: Share, *, seed: int, state: RunState | None = None) -> None:
        collate = ImageCollate(flip_seed=seed if config.flip else None)
        super().__init__(config, collate, share, seed=seed, state=state)


def preview_images(config: ImageConfig, seed: int, n: int) -> "torch.Tensor":
    """The first `n` training images of a run, (n, C, H, W) uint8, as the model will see them."""
    share = Share(rank=0, world=1, global_batch=n, micro_batch=n)
    with ImageStream(config, share, seed=seed) as stream:
        return next(stream).micro_batches[0]["image"]


def image_shape(config: ImageConfig) -> tuple[int, int, int]:
    """(C, H, W) of every image: of `size`, else of the first image.

    Raises ValueError for a source without images.
    """
    if config.size:
        return config.channels, config.size, config.size
    images = Images(config, held_out=0.0)
    for table, origin, _ in scan(config.source, lambda _: config.eval_columns, retry_seconds=config.retry_seconds):
        records = ImageRecords(config).of(images.all(table, origin)[:1])
        channels, height, width = records["image"].shape[1:]
        return channels, height, width
    raise AssertionError("a scan has rows, or raises")
