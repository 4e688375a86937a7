"""The training stream of one rank, for text."""

from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt

from data.documents import Documents, TextMaker
from data.lanes import Lane, State
from data.packing import segments
from data.rows import Position, Rows
from data.shards import Shards, open_shards
from data.steps import Batch, LaneStream, Share, number_of_lanes
from data.text import TextConfig
from data.tokenizers import Tokenizer, load_tokenizer


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


class TextStream(LaneStream):
    """The training batches of one rank, step after step; with `state` (merged over ranks) from there on, to the byte.

    Raises ValueError for numbers that do not divide and for what is wrong with the source; OSError, when iterating, for a
    source that stopped answering for good.
    """

    def __init__(
        self, config: TextConfig, *, seed: int, rank: int, world: int, global_batch: int, micro_batch: int, group: int = 1, state: State | None = None
    ) -> None:
        share = Share(rank=rank, world=world, global_batch=global_batch, micro_batch=micro_batch, group=group)
        total = number_of_lanes(config.lanes, world, state)
        step = share.first_step(state)
        closing = Event()
        tokenizer = load_tokenizer(config.tokenizer)
        shards = open_shards(config.source, config.training_columns, at_least=total, retry_seconds=config.retry_seconds, closing=closing)
        saved = state["lanes"] if state else {}
        lanes = {lane: _lane(config, tokenizer, shards, seed, lane, total, saved.get(str(lane)), closing) for lane in range(rank, total, world)}
        collate = TextCollate(eod=tokenizer.eod if config.document_mask else None)
        super().__init__(lanes, collate, share, total=total, prefetch=config.prefetch, step=step, closing=closing)


def preview(config: TextConfig, seed: int, n: int) -> list[str]:
    """The first `n` training samples of a run, as text: what the model will see."""
    tokenizer = load_tokenizer(config.tokenizer)
    with TextStream(config, seed=seed, rank=0, world=1, global_batch=n, micro_batch=n) as stream:
        return [tokenizer.decode(sample) for sample in next(stream).micro_batches[0]["tokens"].tolist()]


def _lane(config: TextConfig, tokenizer: Tokenizer, shards: Shards, seed: int, lane: int, lanes: int, state: State | None, closing: Event) -> Lane:
    documents = Documents(text_column=config.text_column, key_column=config.key, held_out=config.training_held_out)
    maker = TextMaker(tokenizer, documents, seq_len=config.seq_len)
    state = state or Lane.first_state(maker)
    position = Position(epoch=state["epoch"], shard=state["shard"], row=state["row"])
    rows = Rows(shards, lane=lane, lanes=lanes, seed=seed, position=position, retry_seconds=config.retry_seconds, closing=closing)
    return Lane(rows, maker, lane=lane, seed=seed, window=config.window, state=state)
