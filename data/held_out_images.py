"""Images in a fixed order, without windows or lanes: the held-out set, the same for every world, and sets for metrics and classifiers."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

from data.decode import Stored
from data.image_rows import Images, ImageSamples
from data.images import ImageConfig
from data.scan import scan
from data.sources import Plain
from data.steps import Batch

if TYPE_CHECKING:
    import torch


def held_out_images(config: ImageConfig, *, rank: int, world: int, micro_batch: int) -> list[Batch]:
    """This rank's share of the held-out images, in as many batches as every other rank has; none without `held_out` and `eval_source`.

    Each has "image" uint8 (m, C, H, W), "label" int64 (m,), "sample" int64 (m,): the place among the held-out images, and
    "mask" bool (m,): false where the last batches are filled up. Raises ValueError where no image is held out.
    """
    import torch

    if config.eval_source is None and config.held_out == 0.0:
        return []
    image_NCHW, label_N = image_set(config, "held_out", config.max_eval_samples)
    each = -(-len(label_N) // (world * micro_batch))
    places = (torch.arange(each)[:, None] * world + rank) * micro_batch + torch.arange(micro_batch)
    batches: list[Batch] = []
    for place_M in places:
        there_M = place_M < len(label_N)
        kept_M = place_M.where(there_M, 0)
        batches.append({"image": image_NCHW[kept_M], "label": label_N[kept_M], "sample": place_M.clone(), "mask": there_M})
    return batches


def image_set(config: ImageConfig, split: Literal["train", "held_out"] = "train", limit: int | None = None) -> tuple["torch.Tensor", "torch.Tensor"]:
    """(images (N, C, H, W) uint8, labels (N,) int64): the first `limit` images of a split, or all, in an order that only the source decides.

    Raises ValueError where the split is empty.
    """
    import torch

    samples, parts, left = ImageSamples(config), [], limit
    for images in _stored(config, split):
        parts.append(samples.of(images[:left], skip=config.on_unreadable == "skip"))
        if left is not None and (left := left - len(parts[-1])) == 0:
            break
    if not parts:
        fix = "raise it, or name a data.eval_source" if split == "held_out" else "lower it, or give more data"
        raise ValueError(f"data.held_out = {config.held_out}: no image of the source falls into the {split} share; {fix}")
    records = np.concatenate(parts)
    return torch.from_numpy(records["image"].copy()), torch.from_numpy(records["label"].copy())


def _stored(config: ImageConfig, split: Literal["train", "held_out"]) -> Iterator[list[Stored]]:
    """The images of a split, table by table."""
    images = Images(config, held_out=config.training_held_out)
    apart = split == "held_out" and config.eval_source
    choose = images.all if apart else images.training if split == "train" else images.held_out
    columns: Callable[[Plain], list[str]] = (lambda _: config.eval_columns) if apart else config.columns
    for table, place, _ in scan(apart or config.source, columns, retry_seconds=config.retry_seconds, skip=config.on_unreadable == "skip"):
        if found := choose(table, place):
            yield found
