import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streams import stream_samples

from data.config import ImageConfig, TextConfig
from data.prefetch import child as process
from data.share import Share
from data.sources.kinds import Files
from data.training_stream import TextStream


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    folder = tmp_path_factory.mktemp("corpus")
    for shard in range(5):
        pq.write_table(
            pa.table({"text": [f"{shard} {row} " * (9 + row % 5) ** 3 for row in range(50)]}),
            folder / f"{shard}.parquet",
        )
    return TextConfig(
        source=Files(paths=(str(folder / "*.parquet"),)), seq_len=16, lanes=4, window=16, processes=2, prefetch=1
    )


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if process.__name__ in child.cmdline()]


def test_the_same_samples_and_states_as_without_processes(config: TextConfig) -> None:
    without = dataclasses.replace(config, processes=0)
    alone, last = stream_samples(without, 1, 9)
    first, state = stream_samples(without, 2, 5)
    rest, end = stream_samples(config, 1, 4, state)
    assert first | rest == alone
    assert end == last
    assert not children()


def test_images_likewise() -> None:
    alone, last = stream_samples(ImageConfig(lanes=4), 1, 9)
    first, state = stream_samples(ImageConfig(lanes=4, processes=1), 2, 5)
    rest, end = stream_samples(ImageConfig(lanes=4), 1, 4, state)
    assert first | rest == alone
    assert end == last


def test_a_killed_process_is_started_again_where_it_was(config: TextConfig) -> None:
    config = dataclasses.replace(config, seq_len=500)  # so that a pipe holds a few steps only
    expected, last = stream_samples(dataclasses.replace(config, processes=0), 1, 30, global_batch=256, micro_batch=256)
    with TextStream(config, Share(rank=0, world=1, global_batch=256, micro_batch=256), seed=3) as stream:
        steps = [next(stream) for _ in range(3)]
        victim = children()[0]
        victim.kill()
        steps += [next(stream) for _ in range(27)]
        assert len(children()) == 2
        assert victim.pid not in {child.pid for child in children()}
    assert [row.numpy().tobytes() for step in steps for row in step.micro_batches[0]["tokens"]] == [
        expected[n] for n in range(30 * 256)
    ]
    assert steps[-1].state == last
    assert not children()


def test_one_that_cannot_live_ends_the_run_with_its_name(config: TextConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        TextStream(config, Share(rank=0, world=1, global_batch=16, micro_batch=16), seed=3) as stream,
        pytest.raises(
            OSError,
            match=r"^run.objective.data.processes: data process 0 \(lanes 0, 2\) ended with exit code 1, twice at ",
        ),
    ):
        next(stream)


def test_an_error_of_the_source_comes_through(config: TextConfig, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [""] * 20}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"text": [""] * 20}), tmp_path / "1.parquet")
    config = dataclasses.replace(config, source=Files(paths=(str(tmp_path / "*.parquet"),)), lanes=2, held_out=0.0)
    with TextStream(config, Share(rank=0, world=1, global_batch=2, micro_batch=1), seed=0) as stream:
        for _ in range(2):
            with pytest.raises(ValueError, match="lane 0 has no documents"):
                next(stream)


PARENT = """
import sys, time
from data.sources.kinds import Files
from data.share import Share
from data.training_stream import TextStream
from data.config import TextConfig
config = TextConfig(source=Files(paths=(sys.argv[1],)), seq_len=16, lanes=4, processes=2)
stream = TextStream(config, Share(rank=0, world=1, global_batch=16, micro_batch=16), seed=0)
next(stream)
print("ready", flush=True)
time.sleep(60)
"""


def test_no_process_outlives_its_parent(config: TextConfig) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, config.source.paths[0]], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    left = psutil.Process(parent.pid).children(recursive=True)
    assert len([child for child in left if process.__name__ in child.cmdline()]) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in left):
        assert time.monotonic() < deadline, "data processes live on"
        time.sleep(0.05)
