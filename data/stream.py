"""The training stream of one rank, for text."""

from typing import Any

import numpy as np
import numpy.typing as npt

from data.lanes import State
from data.packing import segments
from data.run_stream import RunStream
from data.steps import Batch
from data.text import TextConfig
from data.tokenizers import load_tokenizer


class TextCollate:
    """Windows to {"tokens": int64 (m, seq_len + 1), "sample": int64 (m,)} and, asked for, "segments" of the shape of tokens."""

    def __init__(self, *, eod: int | None) -> None:
        self._eod = eod

    def room(self, count: int, like: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        return np.empty((count, *like.shape[1:]), np.int64)

    def batch(self, samples: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]) -> Batch:
        import torch

        batch = {"tokens": torch.from_numpy(samples), "sample": torch.from_numpy(numbers)}
        if self._eod is not None:
            batch["segments"] = torch.from_numpy(segments(samples, self._eod))
        return batch


class TextStream(RunStream):
    """The training batches of one rank, of text (run_stream.py)."""

    def __init__(
        self, config: TextConfig, *, seed: int, rank: int, world: int, global_batch: int, micro_batch: int, group: int = 1, state: State | None = None
    ) -> None:
        collate = TextCollate(eod=load_tokenizer(config.tokenizer).eod if config.document_mask else None)
        numbers = {"rank": rank, "world": world, "global_batch": global_batch, "micro_batch": micro_batch, "group": group}
        super().__init__(config, collate, seed=seed, **numbers, state=state)


def preview(config: TextConfig, seed: int, n: int) -> list[str]:
    """The first `n` training samples of a run, as text: what the model will see."""
    tokenizer = load_tokenizer(config.tokenizer)
    with TextStream(config, seed=seed, rank=0, world=1, global_batch=n, micro_batch=n) as stream:
        return [tokenizer.decode(sample) for sample in next(stream).micro_batches[0]["tokens"].tolist()]
