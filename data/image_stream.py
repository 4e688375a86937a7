"""The training stream of one rank, for images."""

from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data.image_rows import ImageMaker, Images, ImageSamples
from data.images import ImageConfig
from data.lanes import Lane, State
from data.rows import Position, Rows
from data.shards import Shards, open_shards
from data.shuffle import splitmix64, stable_hash
from data.steps import Batch, LaneStream, Share, number_of_lanes

if TYPE_CHECKING:
    import torch


class ImageCollate:
    """Records to {"image": uint8 (m, C, H, W), "label": int64 (m,), "sample": int64 (m,)}."""

    def __init__(self, *, flip_seed: int | None) -> None:
        self._flip_key = None if flip_seed is None else np.uint64(stable_hash(flip_seed, "flip"))

    def room(self, count: int, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.empty(count, like.dtype)

    def batch(self, samples: npt.NDArray[Any], numbers: npt.NDArray[np.int64]) -> Batch:
        import torch

        image_MCHW = samples["image"].copy()
        if self._flip_key is not None:
            flipped_M = splitmix64(splitmix64(numbers.astype(np.uint64)) ^ self._flip_key) >> np.uint64(63) == 1
            image_MCHW[flipped_M] = image_MCHW[flipped_M, :, :, ::-1]
        arrays = {"image": image_MCHW, "label": samples["label"].copy(), "sample": numbers}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class ImageStream(LaneStream):
    """The training batches of one rank, step after step; with `state` (merged over ranks) from there on, to the byte.

    Raises ValueError for numbers that do not divide and for what is wrong with the source; OSError, when iterating, for a
    source that stopped answering for good.
    """

    def __init__(
        self, config: ImageConfig, *, seed: int, rank: int, world: int, global_batch: int, micro_batch: int, group: int = 1, state: State | None = None
    ) -> None:
        share = Share(rank=rank, world=world, global_batch=global_batch, micro_batch=micro_batch, group=group)
        total = number_of_lanes(config.lanes, world, state)
        step = share.first_step(state)
        closing = Event()
        shards = open_shards(config.source, config.training_columns, at_least=total, retry_seconds=config.retry_seconds, closing=closing)
        saved = state["lanes"] if state else {}
        lanes = {lane: _lane(config, shards, seed, lane, total, saved.get(str(lane)), closing) for lane in range(rank, total, world)}
        collate = ImageCollate(flip_seed=seed if config.flip else None)
        super().__init__(lanes, collate, share, total=total, prefetch=config.prefetch, step=step, closing=closing)


def preview_images(config: ImageConfig, seed: int, n: int) -> "torch.Tensor":
    """The first `n` training images of a run, (n, C, H, W) uint8: what the model will see."""
    with ImageStream(config, seed=seed, rank=0, world=1, global_batch=n, micro_batch=n) as stream:
        return next(stream).micro_batches[0]["image"]


def image_shape(config: ImageConfig) -> tuple[int, int, int]:
    """(C, H, W) of every image; read from the first one where `size` does not say. Raises ValueError for a source without images."""
    if config.size:
        return config.channels, config.size, config.size
    shards = open_shards(config.source, config.eval_columns, retry_seconds=config.retry_seconds)
    rows = Rows(shards, lane=0, lanes=1, seed=0, position=Position(), retry_seconds=config.retry_seconds, closing=Event())
    images = Images(config, held_out=0.0)
    while (table := rows.next()) is not None:
        if found := images.all(table, rows.place):
            channels, height, width = ImageSamples(config).of(found[:1])["image"].shape[1:]
            return channels, height, width
    raise ValueError(f"data.source: no images in {', '.join(rows.names())}; give files with data")


def _lane(config: ImageConfig, shards: Shards, seed: int, lane: int, lanes: int, state: State | None, closing: Event) -> Lane:
    maker = ImageMaker(config)
    state = state or Lane.first_state(maker)
    position = Position(epoch=state["epoch"], shard=state["shard"], row=state["row"])
    rows = Rows(shards, lane=lane, lanes=lanes, seed=seed, position=position, retry_seconds=config.retry_seconds, closing=closing)
    return Lane(rows, maker, lane=lane, seed=seed, window=config.window, state=state)
