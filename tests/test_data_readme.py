"""The worked example of data/README.md is what the streams give."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import data
from data.batches import merge_states
from data.config import TextConfig
from data.share import RunState, Share
from data.sources.kinds import Files, Mixture, Part
from data.training_stream import TextStream

assert data.__file__ is not None
README = Path(data.__file__).with_name("README.md")
HEADING = "| step | sample | lane | document | rank of 4 | rank of 2 | its micro-batch |"

Row = tuple[int, int, int, str, int, int, int]
"""(step, sample, lane, document, rank of four, rank of two, micro-batch of that rank)."""

Served = dict[int, tuple[str, int, int]]
"""By the sample's number: (document, rank, micro-batch of that rank's step)."""


@pytest.fixture
def config(tmp_path: Path) -> TextConfig:
    """Two sources of four files with four documents each, named after source, file and line."""
    parts = []
    for source in "ab":
        for file in range(4):
            lines = [f"{source}{file}.{line}" for line in range(4)]
            (tmp_path / f"{source}{file}.txt").write_text("\n".join(lines))
        files = Files(paths=(f"{tmp_path}/{source}*.txt",), sample_by="line")
        parts.append(Part(weight=1, source=files))
    return TextConfig(source=Mixture(parts=tuple(parts)), seq_len=5, lanes=4, window=4, held_out=0.0, prefetch=0)


def serve(config: TextConfig, *, world: int, steps: int, state: RunState | None = None) -> tuple[Served, RunState]:
    """What `world` ranks get in some steps, and the state after them as a checkpoint holds it."""
    served: Served = {}
    states: list[RunState] = []
    for rank in range(world):
        share = Share(rank=rank, world=world, global_batch=8, micro_batch=2)
        with TextStream(config, share, seed=0, state=state) as stream:
            for _ in range(steps):
                step = next(stream)
                for number, batch in enumerate(step.micro_batches):
                    for sample, tokens in zip(batch["sample"].tolist(), batch["tokens"].tolist(), strict=True):
                        served[sample] = bytes(tokens[1:-1]).decode(), rank, number
            states.append(step.state)
    merged: RunState = json.loads(json.dumps(merge_states(states)))
    return served, merged


def rows_of(text: str) -> Iterator[Row]:
    """The rows of the example's table."""
    _, _, table = text.partition(HEADING)
    for line in table.splitlines()[2:]:
        if not line.startswith("|"):
            return
        step, sample, lane, document, of_four, of_two, micro_batch = (
            cell.strip() for cell in line.strip("|").split("|")
        )
        yield int(step), int(sample), int(lane), document, int(of_four), int(of_two), int(micro_batch)


def test_the_table_is_what_four_ranks_and_then_two_get(config: TextConfig) -> None:
    four, _ = serve(config, world=4, steps=2)
    two, _ = serve(config, world=2, steps=2)
    assert {sample: document for sample, (document, _, _) in four.items()} == {n: two[n][0] for n in two}
    rows = [(n // 8, n, n % 4, four[n][0], four[n][1], two[n][1], two[n][2]) for n in sorted(four)]
    assert list(rows_of(README.read_text())) == rows
    for row in rows:
        document = row[3]
        lane = row[2]
        assert int(document[1]) == lane, "lane n reads the files numbered n"


def test_two_ranks_continue_where_four_stopped(config: TextConfig) -> None:
    first, state = serve(config, world=4, steps=1)
    rest, _ = serve(config, world=2, steps=1, state=state)
    served = {n: document for n, (document, _, _) in sorted((first | rest).items())}
    assert served == {row[1]: row[3] for row in rows_of(README.read_text())}
