"""The training stream of one rank, for text."""

import numpy as np
import numpy.typing as npt

from data.batches import Batch, RunState, Share
from data.config import TextConfig
from data.lanes.lane import Samples
from data.text.packing import segments
from data.text.tokenizers import load_tokenizer
from data.training_stream import RunStream


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


class TextStream(RunStream):
    """The training batches of one rank, of text (run_stream.py)."""

    def __init__(self, config: TextConfig, share: Share, *, seed: int, state: RunState | None = None) -> None:
        eod = load_tokenizer(config.tokenizer).eod if config.document_mask else None
        super().__init__(config, TextCollate(eod=eod), share, seed=seed, state=state)


def preview(config: TextConfig, seed: int, n: int) -> list[str]:
    """The first `n` training samples of a run as text, as the model will see them."""
    tokenizer = load_tokenizer(config.tokenizer)
    share = Share(rank=0, world=1, global_batch=n, micro_batch=n)
    with TextStream(config, share, seed=seed) as stream:
        return [tokenizer.decode(sample) for sample in next(stream).micro_batches[0]["tokens"].tolist()]
