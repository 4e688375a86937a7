"""The lanes of a run, from its config."""

from collections.abc import Mapping, Sequence
from threading import Event

from data.documents import Documents, TextMaker
from data.image_rows import ImageMaker
from data.images import ImageConfig
from data.lanes import Lane, Maker, State
from data.mixture import FIRST, Counted, MixedLane, Stream
from data.rows import Position, Reading, Rows
from data.shards import open_shards
from data.sources import Mixture, Plain, parts_of
from data.text import TextConfig
from data.tokenizers import load_tokenizer

Config = TextConfig | ImageConfig
Skipped = Sequence[Sequence[Sequence[int]]]


def open_lanes(
    config: Config, *, seed: int, states: Mapping[str, State | None], total: int, closing: Event, skipped: Skipped | None = None
) -> dict[int, Counted]:
    """The lanes of `total` that are named in `states`, each from where its state left it, or from the start where there is none.

    Lanes that begin leave out `skipped`, for each part of the source.

    Raises ValueError for what is wrong with the source or the tokenizer.
    """
    reading = Reading(retry_seconds=config.retry_seconds, skip=config.on_unreadable == "skip", closing=closing)
    parts = parts_of(config.source)
    opened = [open_shards(part.source, config.columns(part.source), at_least=total, retry_seconds=config.retry_seconds, closing=closing) for part in parts]
    makers = [_maker(config, part.source) for part in parts]

    def part_of(lane: int, part: int, state: State | None) -> Lane:
        key = seed if len(parts) == 1 else f"{seed} part {part}"
        state = state or {**Lane.first_state(makers[part]), "skipped": skipped[part] if skipped else []}
        position = Position(epoch=state["epoch"], shard=state["shard"], row=state["row"])
        rows = Rows(opened[part], lane=lane, lanes=total, seed=key, position=position, reading=reading, skipped=state["skipped"], wide=state["wide"])
        return Lane(rows, makers[part], lane=lane, seed=key, window=config.window, state=state)

    lanes: dict[int, Counted] = {}
    for lane, state in ((int(name), state) for name, state in states.items()):
        stream: Stream
        if isinstance(config.source, Mixture):
            places = state["parts"] if state else [None] * len(parts)
            weights = [part.weight for part in parts]
            mixed = [part_of(lane, number, place) for number, place in enumerate(places)]
            stream = MixedLane(mixed, weights, lane=lane, seed=seed, taken=state["drawn"] if state else 0)
        else:
            stream = part_of(lane, 0, state)
        counts = state or FIRST
        lanes[lane] = Counted(stream, samples=counts["samples"], digest=counts["digest"])
    return lanes


def _maker(config: Config, source: Plain) -> Maker:
    match config:
        case TextConfig():
            documents = Documents(text_column=config.text_column, key_column=config.key(source), held_out=config.training_held_out)
            return TextMaker(load_tokenizer(config.tokenizer), documents, seq_len=config.seq_len)
        case ImageConfig():
            return ImageMaker(config)
