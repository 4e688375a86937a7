"""The training stream of one rank, for images."""

from typing import cast

import numpy as np
import numpy.typing as npt

from data.images.records import Records
from data.lanes.lane import Samples
from data.lanes.shuffle import splitmix64, stable_hash
from data.share import Batch


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
