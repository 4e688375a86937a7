"""Data that are made while training: each sample is a function of the seed and its number."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from data.batches import Step
from data.share import Batch, RunState, Share

Make = Callable[[Tensor, str], Batch]
"""Makes a batch from the numbers (M,) of its samples and their split.

The batch holds the numbers under "sample".
"""


class MadeStream:
    """This rank's micro-batches of training data, from step 0 or from where `state` ended."""

    def __init__(self, make: Make, share: Share, state: RunState | None):
        self.make = make
        self.share = share
        self.step = share.first_step(state)

    def __iter__(self) -> Iterator[Step]:
        while True:
            numbers = torch.from_numpy(self.share.numbers(self.step))
            self.step += 1
            batches = [self.make(part, "training") for part in numbers.split(self.share.micro_batch)]
            yield Step(
                micro_batches=batches,
                state=RunState(step=self.step, samples=self.step * self.share.global_batch, lanes={}),
            )

    def close(self) -> None:
        """Nothing is open."""


def made_held_out(make: Make, samples: int, share: Share) -> list[Batch]:
    """This rank's part of `samples` held-out samples, with as many batches on every rank.

    "mask" is true for the samples that count.
    """
    batches = -(-samples // (share.world * share.micro_batch))
    firsts = (torch.arange(batches)[:, None] * share.world + share.rank) * share.micro_batch
    numbers = firsts + torch.arange(share.micro_batch)
    return [make(number_M, "held out") | {"mask": number_M < samples} for number_M in numbers]
