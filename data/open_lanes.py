"""Opens the lanes of a run, from its config."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Generic

from data.batches import OwnLanes
from data.config import ImageConfig, TextConfig
from data.images.decode import StoredImage
from data.images.records import ImageSamples
from data.lanes.lane import Document, Lane, LaneState, SampleMaker
from data.lanes.mixture import Counted, CountedState, MixedLane, SampleStream, counts_of
from data.lanes.rows import Reading, Rows
from data.share import Share
from data.sources.kinds import Mixture, Plain, parts_of
from data.sources.shards import Shards, open_shards
from data.text.documents import Documents, TextSamples
from data.text.tokenizers import Text, load_tokenizer

Config = TextConfig | ImageConfig


@dataclass(frozen=True, kw_only=True)
class LaneJob:
    """The lanes that a process reads ahead (process.py), and the step from which it does."""

    config: Config
    share: Share
    seed: int
    total: int
    step: int
    states: Mapping[str, CountedState | None]

    def open(self, closing: Event) -> OwnLanes:
        """The lanes, opened in this process."""
        lanes = open_lanes(self.config, seed=self.seed, states=self.states, total=self.total, closing=closing)
        return OwnLanes(lanes, self.share, total=self.total, step=self.step)


Skipped = Sequence[Sequence[Sequence[int]]]
"""For each part of the source, the shards to skip (see RowsState)."""


@dataclass(frozen=True, kw_only=True)
class _Dealing:
    """How the rows of one part of the source are dealt out to its lanes."""

    shards: Shards
    seed: int | str
    window: int
    total: int
    reading: Reading
    skipped: Sequence[Sequence[int]]


@dataclass(frozen=True)
class _OpenPart(Generic[Document]):
    """One part of the source, opened.

    Its lanes share the shards and the sample maker, which both cache.
    """

    dealing: _Dealing
    maker: SampleMaker[Document]

    def lane(self, number: int, state: LaneState | None) -> Lane[Document]:
        """Lane `number`, from `state` or from the start."""
        dealing = self.dealing
        if state is None:
            state = Lane.first_state(self.maker, dealing.skipped)
        rows = Rows(
            dealing.shards,
            lane=number,
            lanes=dealing.total,
            seed=dealing.seed,
            reading=dealing.reading,
            state=state,
        )
        return Lane(rows, self.maker, lane=number, seed=dealing.seed, window=dealing.window, state=state)


_TextPart = _OpenPart[Text]
_ImagePart = _OpenPart[StoredImage]


def open_lanes(
    config: Config,
    *,
    seed: int,
    states: Mapping[str, CountedState | None],
    total: int,
    closing: Event,
    skipped: Skipped | None = None,
) -> dict[int, Counted]:
    """The lanes that `states` names, each from its state, or from its start if that is None.

    Lanes that begin at the start leave out `skipped`.

    Raises ValueError for problems with the source or the tokenizer.
    """
    parts = _open_parts(config, seed=seed, total=total, closing=closing, skipped=skipped)
    weights = [part.weight for part in parts_of(config.source)]
    lanes: dict[int, Counted] = {}
    for name, state in states.items():
        number = int(name)
        stream: SampleStream
        if isinstance(config.source, Mixture):
            assert state is None or "parts" in state, "the state of another source"
            part_states = state["parts"] if state else [None] * len(parts)
            mixed = [part.lane(number, part_state) for part, part_state in zip(parts, part_states, strict=True)]
            drawn = state["drawn"] if state else 0
            stream = MixedLane(mixed, weights, lane=number, seed=seed, drawn=drawn)
        else:
            assert state is None or "parts" not in state, "the state of a mixture"
            stream = parts[0].lane(number, state)
        lanes[number] = Counted(stream, counts_of(state))
    return lanes


def _open_parts(
    config: Config, *, seed: int, total: int, closing: Event, skipped: Skipped | None
) -> list[_TextPart | _ImagePart]:
    parts = parts_of(config.source)
    skip = config.on_unreadable == "skip"
    reading = Reading(retry_seconds=config.retry_seconds, skip=skip, closing=closing)
    opened: list[_TextPart | _ImagePart] = []
    for number, part in enumerate(parts):
        shards = open_shards(
            part.source,
            config.columns(part.source),
            at_least=total,
            retry_seconds=config.retry_seconds,
            closing=closing,
        )
        dealing = _Dealing(
            shards=shards,
            seed=seed if len(parts) == 1 else f"{seed} part {number}",
            window=config.window,
            total=total,
            reading=reading,
            skipped=skipped[number] if skipped else [],
        )
        match config:
            case TextConfig():
                opened.append(_OpenPart(dealing, _text_samples(config, part.source)))
            case ImageConfig():
                opened.append(_OpenPart(dealing, ImageSamples(config)))
    return opened


def _text_samples(config: TextConfig, source: Plain) -> TextSamples:
    key_column = config.key(source)
    documents = Documents(text_column=config.text_column, key_column=key_column, held_out=config.training_held_out)
    return TextSamples(load_tokenizer(config.tokenizer), documents, seq_len=config.seq_len)
