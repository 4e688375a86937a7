import copy
import dataclasses
import json
from pathlib import Path
from threading import Event

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.batches import merge_states
from data.config import ImageConfig, TextConfig
from data.ledger import Line, entry, verify
from data.open_lanes import open_lanes
from data.share import RunState, Share
from data.sources.kinds import Files, Mixture, Part
from data.training_stream import ImageStream, TextStream

BATCH = {"global_batch": 16, "micro_batch": 4}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    folder = tmp_path_factory.mktemp("corpus")
    for shard in range(6):
        pq.write_table(
            pa.table({"text": [f"{shard} {row} " * (1 + row % 5) for row in range(40)]}), folder / f"{shard}.parquet"
        )
    parts = tuple(
        Part(weight=weight, source=Files(paths=(str(folder / f"{shards}.parquet"),)))
        for weight, shards in ((1, "[0-3]"), (2, "[45]"))
    )
    return TextConfig(source=Mixture(parts=parts), seq_len=16, lanes=4, window=16, held_out=0.0, prefetch=0)


CONFIGS = ["text", "images"]


@pytest.fixture
def config(request: pytest.FixtureRequest, text: TextConfig) -> TextConfig | ImageConfig:
    return text if request.param == "text" else ImageConfig(lanes=4, held_out=0.0, prefetch=0)


def attempt(
    lines: list[Line],
    config: TextConfig | ImageConfig,
    number: int,
    world: int,
    steps: int,
    state: RunState | None = None,
    every: int = 3,
) -> RunState | None:
    """Add the lines of an attempt that saves every `every` steps; return its last saved state."""
    kind = ImageStream if isinstance(config, ImageConfig) else TextStream
    start = entry(state, tokens_per_sample=16) if state else {"step": 0, "lanes": {}}
    lines.append({"attempt": number, "group": 1, "global_batch": 16, **start})
    streams = [kind(config, Share(rank=rank, world=world, **BATCH), seed=3, state=state) for rank in range(world)]
    for done in range(1, steps + 1):
        merged = merge_states([next(stream).state for stream in streams])
        if (start["step"] + done) % every == 0:
            state = json.loads(json.dumps(merged))
            lines.append({"attempt": number, **entry(state, tokens_per_sample=16)})
    return state


@pytest.mark.parametrize("config", CONFIGS, indirect=True)
def test_a_run_that_was_resumed_on_other_worlds_has_lost_and_repeated_nothing(config: TextConfig | ImageConfig) -> None:
    """Two steps after each checkpoint are lost with their attempt, and repeated by the next."""
    lines = []
    state = None
    for number, (world, steps) in enumerate(((4, 8), (2, 5), (1, 11))):
        state = attempt(lines, config, number, world, steps, state)
    verdict = verify(config, json.loads(json.dumps(lines)), seed=3, last_step=18)
    assert verdict.problems == []
    assert (verdict.lost, verdict.repeated, verdict.attempts) == (0, 0, 3)
    assert (verdict.samples, verdict.tokens) == (18 * 16, 18 * 16 * 16)
    assert (verdict.documents > 0) == isinstance(
        config, TextConfig
    )  # the digits of a lane are one chunk, not finished yet
    assert verify(config, lines, seed=3, last_step=9).samples == 9 * 16


def test_a_later_attempt_may_begin_at_an_earlier_checkpoint(text: TextConfig) -> None:
    lines = []
    first = attempt(lines, text, 0, 1, 3)
    attempt(lines, text, 1, 1, 6, first)
    attempt(lines, text, 2, 2, 9, first)
    verdict = verify(text, lines, seed=3, last_step=12)
    assert (verdict.problems, verdict.replayed, verdict.samples) == ([], 6, 12 * 16)


@pytest.mark.parametrize("config", CONFIGS, indirect=True)
@pytest.mark.parametrize(
    ("moved", "message", "lost", "repeated"), [(2, "2 samples were lost", 2, 0), (-3, "3 samples were repeated", 0, 3)]
)
def test_a_stream_that_goes_on_elsewhere_is_found_out(
    config: TextConfig | ImageConfig, moved: int, message: str, lost: int, repeated: int
) -> None:
    """A faulty loader saves the position that it has read to, not used to; or the reverse."""
    lines = []
    state = attempt(lines, config, 0, 1, 6)
    honest = copy.deepcopy(state)
    taken = state["lanes"]["2"]["samples"]
    lane = open_lanes(config, seed=3, states={"2": None}, total=4, closing=Event())[2]
    for count in [4] * (taken // 4) if moved > 0 else [taken + moved]:
        lane.take(count)
    if moved > 0:
        lane.take(moved)
    state["lanes"]["2"] = lane.state() | {key: honest["lanes"]["2"][key] for key in ("samples", "digest")}
    attempt(lines, config, 1, 1, 6, state)
    verdict = verify(config, lines, seed=3, last_step=12)
    assert verdict.problems == [f"lane 2: between steps 6 and 9 {message}"]
    assert (verdict.lost, verdict.repeated) == (lost, repeated)


def test_other_data_or_another_order_is_found_out(text: TextConfig) -> None:
    lines = []
    attempt(lines, text, 0, 1, 6)
    verdict = verify(text, lines, seed=4, last_step=6)
    assert [problem for problem in verdict.problems if "are not those of the source in its order" in problem]


def test_attempts_that_do_not_join_are_found_out(text: TextConfig) -> None:
    lines = []
    state = attempt(lines, text, 0, 1, 6)
    attempt(lines, text, 1, 1, 3, state)
    missing = [line for line in lines if line["step"] != 6 or "global_batch" in line]
    assert (
        verify(text, missing, seed=3, last_step=9).problems[0]
        == "attempt 1 began at step 6, which no attempt before it saved"
    )
    moved = copy.deepcopy(lines)
    next(line for line in moved if line["attempt"] == 1)["lanes"]["3"]["digest"] = "0"
    assert (
        "lane 3: attempt 1 began at step 6 at another sample than was saved"
        in verify(text, moved, seed=3, last_step=9).problems
    )
    assert verify(text, lines, seed=3, last_step=7).problems == ["the ledger has no line for step 7"]


def test_what_was_skipped_is_counted_and_derived_again(text: TextConfig, tmp_path: Path) -> None:
    """A damaged shard and its neighbour, on one lane each; the proof reads them as the run did."""
    for shard in range(4):
        pq.write_table(
            pa.table({"text": [f"{shard} {row} " * 9 for row in range(30)]}),
            tmp_path / f"{shard}.parquet",
            row_group_size=10,
        )
    damaged = tmp_path / "2.parquet"
    content = bytearray(damaged.read_bytes())
    content[200:260] = bytes(60)
    damaged.write_bytes(bytes(content))
    config = TextConfig(
        source=Files(paths=(f"{tmp_path}/*.parquet",)),
        seq_len=16,
        lanes=2,
        window=16,
        held_out=0.0,
        prefetch=0,
        on_unreadable="skip",
    )
    lines = []
    state = attempt(lines, config, 0, 2, 7)
    attempt(lines, config, 1, 1, 6, state)
    verdict = verify(config, lines, seed=3, last_step=12)
    assert verdict.problems == []
    assert verdict.skipped >= 1
    with pytest.raises(
        ValueError,
        match=r"cannot read .*2.parquet .*; repair the file, remove it from the source, or set .*on_unreadable to skip",
    ):
        attempt([], dataclasses.replace(config, on_unreadable="fail"), 0, 1, 6)
