"""The training stream of one rank, for text."""

import numpy as np
import numpy.typing as npt

from data.lanes.lane import Samples
from data.share import Batch
from data.text.packing import segments


class TextCollate:
    """Windows to {"tokens": int64 (m, seq_len + 1), "sample": int64 (m,)}.

    With `eod`, also "segments" (packing.py), of the shape of tokens.
    """

    def __init__(self, *, eod: int | None) -> None:
        self.eod = eod

    def room(self, count: int, like: Samples) -> Samples:
        return np.empty((count, *like.shape[1:]), np.int64)

    def batch(self, samples: Samples, numbers: npt.NDArray[np.int64]) -> Batch:
        import torch

        tokens = samples.astype(np.int64, copy=False)
        batch = {"tokens": torch.from_numpy(tokens), "sample": torch.from_numpy(numbers)}
        if self.eod is not None:
            batch["segments"] = torch.from_numpy(segments(tokens, self.eod))
        return batch
