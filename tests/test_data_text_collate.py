import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.batches import merge_states
from data.config import TextConfig
from data.share import RunState, Share
from data.sources.kinds import Files
from data.text.packing import segments
from data.training_stream import TextStream, preview


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    """Nine shards of 20 to 90 documents of up to 60 characters.

    An epoch is about 1,000 windows of 17 tokens.
    """
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for shard in range(9):
        texts = ["".join(map(chr, rng.integers(97, 123, rng.integers(0, 60)))) for _ in range(rng.integers(20, 90))]
        pq.write_table(pa.table({"text": texts}), folder / f"{shard}.parquet")
    return TextConfig(
        source=Files(paths=(str(folder / "*.parquet"),)), seq_len=16, lanes=8, window=32, held_out=0.1, prefetch=2
    )


def run(
    config: TextConfig,
    world: int,
    steps: int,
    state: RunState | None = None,
    global_batch: int = 32,
    micro_batch: int = 2,
    group: int = 1,
    seed: int = 3,
) -> tuple[dict[int, list[int]], RunState, list[tuple[int, list[int]]]]:
    """({sample number: tokens}, merged state, each rank's numbers) of some steps at `world`."""
    samples = {}
    states = []
    served = []
    for rank in range(world):
        with TextStream(
            config,
            Share(rank=rank, world=world, global_batch=global_batch, micro_batch=micro_batch, group=group),
            seed=seed,
            state=state,
        ) as stream:
            for _ in range(steps):
                step = next(stream)
                assert len(step.micro_batches) * micro_batch * world == global_batch
                numbers = [n for batch in step.micro_batches for n in batch["sample"].tolist()]
                assert numbers == sorted(numbers)
                served.append((rank, numbers))
                rows = [row for batch in step.micro_batches for row in batch["tokens"].tolist()]
                assert not samples.keys() & set(numbers)
                samples |= dict(zip(numbers, rows, strict=True))
            states.append(step.state)
    return samples, json.loads(json.dumps(merge_states(states))), served


@pytest.mark.parametrize(("group", "micro_batch"), [(1, 2), (2, 4), (4, 4)])
def test_the_same_global_batches_for_every_world(corpus: TextConfig, group: int, micro_batch: int) -> None:
    alone, state, _ = run(corpus, 1, 6, group=group, micro_batch=micro_batch)
    assert sorted(alone) == list(range(6 * 32))
    for world in (2, 4, 8):
        samples, other, served = run(corpus, world, 6, group=group, micro_batch=micro_batch)
        assert samples == alone
        assert other == state
        assert all((n // group) % 8 % world == rank for rank, numbers in served for n in numbers)


def test_resuming_on_other_worlds_is_the_uninterrupted_run(corpus: TextConfig) -> None:
    """4 -> 2 -> 8 -> 1 over more than an epoch: nothing lost, nothing repeated."""
    uninterrupted, last, _ = run(corpus, 1, 60)
    assert max(lane["epoch"] for lane in last["lanes"].values()) >= 1
    resumed = {}
    state = None
    for world, steps in ((4, 7), (2, 30), (8, 11), (1, 12)):
        samples, state, _ = run(corpus, world, steps, state)
        resumed |= samples
    assert resumed == uninterrupted
    assert state == last


def test_steps_that_use_only_some_lanes(corpus: TextConfig) -> None:
    """A global batch of 4 over 8 lanes: each step serves half of them."""
    alone, state, _ = run(corpus, 1, 9, global_batch=4, micro_batch=1)
    halves, halfway, _ = run(corpus, 4, 5, global_batch=4, micro_batch=1)
    rest, end, _ = run(corpus, 2, 4, halfway, global_batch=4, micro_batch=1)
    assert halves | rest == alone
    assert end == state


def test_prefetching_changes_nothing(corpus: TextConfig) -> None:
    eager, state, _ = run(corpus, 2, 5)
    lazy, same, _ = run(dataclasses.replace(corpus, prefetch=0), 2, 5)
    assert lazy == eager
    assert same == state


def test_the_seed_changes_the_order(corpus: TextConfig) -> None:
    assert run(corpus, 1, 2)[0] != run(corpus, 1, 2, seed=4)[0]


def test_lanes_are_chosen_where_the_job_leaves_them_open_and_kept_on_resume(corpus: TextConfig) -> None:
    config = dataclasses.replace(corpus, lanes=None)
    assert len(run(config, 2, 1)[1]["lanes"]) == 8
    _, state, _ = run(config, 3, 1, global_batch=12)
    assert len(state["lanes"]) == 24
    assert len(run(config, 2, 1, state, global_batch=12)[1]["lanes"]) == 24


def test_document_mask_gives_segments(corpus: TextConfig) -> None:
    with TextStream(
        dataclasses.replace(corpus, document_mask=True), Share(rank=0, world=1, global_batch=8, micro_batch=8), seed=0
    ) as stream:
        batch = next(stream).micro_batches[0]
    assert batch["segments"].tolist() == segments(batch["tokens"].numpy(), 256).tolist()
    assert batch["segments"].max() > 0


def test_preview_shows_the_first_samples(corpus: TextConfig) -> None:
    samples, _, _ = run(corpus, 1, 1)
    shown = preview(corpus, 3, 4)
    expected = ["".join("<eod>" if token == 256 else chr(token) for token in samples[n]) for n in range(4)]
    assert shown == expected


def test_closing_ends_the_thread_and_the_iteration(corpus: TextConfig) -> None:
    stream = TextStream(corpus, Share(rank=0, world=1, global_batch=8, micro_batch=8), seed=0)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "data"]
    assert list(stream) == []


def test_an_error_in_the_background_reaches_the_consumer_each_time(corpus: TextConfig, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [""] * 20}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"text": [""] * 20}), tmp_path / "1.parquet")
    config = dataclasses.replace(corpus, source=Files(paths=(str(tmp_path / "*.parquet"),)), lanes=2, held_out=0.0)
    with TextStream(config, Share(rank=0, world=1, global_batch=2, micro_batch=1), seed=0) as stream:
        for _ in range(2):
            with pytest.raises(ValueError, match="lane 0 has no documents"):
                next(stream)


@pytest.mark.parametrize(
    ("world", "global_batch", "micro_batch", "group", "message"),
    [
        (3, 32, 2, 1, "^run.batch.global_batch: 32 is not a multiple of 3 workers x micro_batch 2; use 36$"),
        (2, 32, 4, 3, "^run.batch.micro_batch: 4 does not hold whole groups of 3 samples; use 6$"),
    ],
)
def test_numbers_that_do_not_divide_are_one_line(
    world: int, global_batch: int, micro_batch: int, group: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Share(rank=0, world=world, global_batch=global_batch, micro_batch=micro_batch, group=group)


def test_a_state_of_other_numbers_is_refused(corpus: TextConfig) -> None:
    _, state, _ = run(corpus, 1, 2)
    with pytest.raises(
        ValueError, match=r"^run.objective.data.lanes: 16, but the checkpoint has 8; use 8 to resume it$"
    ):
        run(dataclasses.replace(corpus, lanes=16), 1, 1, state)
    with pytest.raises(
        ValueError,
        match=r"^run.batch.global_batch: 16, but the checkpoint's 2 steps held 64 samples; use 32 to resume it$",
    ):
        run(corpus, 1, 1, state, global_batch=16)
    with pytest.raises(
        ValueError, match=r"^run.objective.data.lanes: 8 is not a multiple of the 3 workers; .* such as 24$"
    ):
        run(corpus, 3, 1, global_batch=12)
