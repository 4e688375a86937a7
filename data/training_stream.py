"""The training stream of one rank: the part that text and images share."""

from threading import Event
from typing import TYPE_CHECKING

from data.batches import Collate, LaneSource, LaneStream
from data.config import ImageConfig, TextConfig
from data.images.collate import ImageCollate
from data.open_lanes import Config, LaneJob
from data.prefetch.processes import ProcessLanes
from data.share import RunState, Share, number_of_lanes
from data.text.collate import TextCollate
from data.text.tokenizers import load_tokenizer

if TYPE_CHECKING:
    import torch


class RunStream(LaneStream):
    """The training batches of one rank, step after step.

    With `state` it continues from there, to the byte; `state` is merged over the ranks that saved
    it (batches.merge_states).

    Raises ValueError for numbers that do not divide and for problems with the source. Iterating
    raises OSError for a source that has stopped answering for good.
    """

    def __init__(
        self, config: Config, collate: Collate, share: Share, *, seed: int, state: RunState | None = None
    ) -> None:
        total = number_of_lanes(config.lanes, share.world, state)
        names = [str(number) for number in range(share.rank, total, share.world)]
        job = LaneJob(
            config=config,
            share=share,
            seed=seed,
            total=total,
            step=share.first_step(state),
            states={name: state["lanes"][name] if state else None for name in names},
        )
        closing = Event()
        source: LaneSource = ProcessLanes(job, closing) if config.processes else job.open(closing)
        super().__init__(
            source,
            collate,
            share,
            states=job.states,
            total=total,
            prefetch=config.prefetch,
            step=job.step,
            closing=closing,
        )


class ImageStream(RunStream):
    """The training batches of one rank, of images."""

    def __init__(self, config: ImageConfig, share: Share, *, seed: int, state: RunState | None = None) -> None:
        collate = ImageCollate(flip_seed=seed if config.flip else None)
        super().__init__(config, collate, share, seed=seed, state=state)


def preview_images(config: ImageConfig, seed: int, n: int) -> "torch.Tensor":
    """The first `n` training images of a run, (n, C, H, W) uint8, as the model will see them."""
    share = Share(rank=0, world=1, global_batch=n, micro_batch=n)
    with ImageStream(config, share, seed=seed) as stream:
        return next(stream).micro_batches[0]["image"]


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
