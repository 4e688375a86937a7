import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.lanes.lane import Lane, LaneState, Samples
from data.lanes.rows import Reading, Rows
from data.sources.kinds import Files
from data.sources.shards import open_shards
from data.text.documents import Documents, TextSamples
from data.text.tokenizers import ByteTokenizer, Text

LENGTH = 7  # with seq_len 8 each sample is one document of seven characters and its end


def write(folder: Path, sizes: Sequence[int], length: int = LENGTH, row_group_size: int | None = None) -> Files:
    """One parquet file for each size; every text is unique and names its shard and row."""
    for shard, size in enumerate(sizes):
        texts = pa.array([f"{shard:02d}{row:05d}".ljust(length, "x") for row in range(size)], pa.string())
        pq.write_table(pa.table({"text": texts}), folder / f"{shard:02d}.parquet", row_group_size=row_group_size)
    return Files(paths=(str(folder / "*.parquet"),))


def make_lane(
    source: Files,
    *,
    lane: int = 0,
    lanes: int = 1,
    seed: int = 0,
    window: int = 100,
    seq_len: int = LENGTH + 1,
    held_out: float = 0.0,
    state: LaneState | None = None,
    split: bool = False,
) -> Lane[Text]:
    maker = TextSamples(
        ByteTokenizer(), Documents(text_column="text", key_column="text", held_out=held_out), seq_len=seq_len
    )
    state = json.loads(json.dumps(state)) if state else Lane.first_state(maker)
    shards = open_shards(source, ["text"], at_least=lanes if split else 1)
    rows = Rows(shards, lane=lane, lanes=lanes, seed=seed, reading=Reading(retry_seconds=0), state=state)
    return Lane(rows, maker, lane=lane, seed=seed, window=window, state=state)


def names(samples: Samples) -> list[str]:
    """The documents in (m, 9) samples of one document each."""
    return [bytes(sample[1 : LENGTH + 1].tolist()).decode() for sample in samples]


def all_names(sizes: Sequence[int]) -> list[str]:
    return sorted(f"{shard:02d}{row:05d}" for shard, size in enumerate(sizes) for row in range(size))


UNEVEN = [150, 0, 90, 7, 64, 0, 130, 1, 65]


def test_each_document_exactly_once_an_epoch_and_another_order_in_the_next(tmp_path: Path) -> None:
    lane = make_lane(write(tmp_path, UNEVEN))
    epochs = [names(lane.take(sum(UNEVEN))) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [all_names(UNEVEN)] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(epoch != sorted(epoch) for epoch in epochs)


@pytest.mark.parametrize("lanes", [2, 3, 4])
def test_lanes_share_the_documents_out(tmp_path: Path, lanes: int) -> None:
    source = write(tmp_path, [40, 64, 70, 129])
    sizes = [sum([40, 64, 70, 129][lane::lanes]) for lane in range(lanes)]
    seen = [
        name for lane, size in enumerate(sizes) for name in names(make_lane(source, lane=lane, lanes=lanes).take(size))
    ]
    assert sorted(seen) == all_names([40, 64, 70, 129])


@pytest.mark.parametrize(("sizes", "lanes"), [([200], 3), ([130, 71], 8), ([64, 65, 66], 4)])
def test_fewer_shards_than_lanes(tmp_path: Path, sizes: list[int], lanes: int) -> None:
    """A lane that shares a shard has every n-th row of it; together, the lanes have each row once.

    That holds per epoch.
    """
    source = write(tmp_path, sizes)
    seen = []
    for lane in range(lanes):
        shard = lane % len(sizes)
        sharers = range(shard, lanes, len(sizes))
        rows = range(sharers.index(lane), sizes[shard], len(sharers))
        epochs = make_lane(source, lane=lane, lanes=lanes).take(2 * len(rows))
        assert (
            sorted(names(epochs[: len(rows)]))
            == sorted(names(epochs[len(rows) :]))
            == [f"{shard:02d}{row:05d}" for row in rows]
        )
        seen += names(epochs[: len(rows)])
    assert sorted(seen) == all_names(sizes)


def test_one_file_of_many_row_groups_is_split_by_them(tmp_path: Path) -> None:
    source = write(tmp_path, [300], row_group_size=50)
    groups = [2, 2, 1, 1]  # of 50 rows: 0 and 4, 1 and 5, 2, 3
    for lane in range(4):
        seen = names(make_lane(source, lane=lane, lanes=4, split=True).take(50 * groups[lane]))
        assert sorted(seen) == [f"00{row:05d}" for row in range(300) if row // 50 % 4 == lane]


def test_empty_shards_are_dealt_to_nobody(tmp_path: Path) -> None:
    """Four lanes over six shards of which three are empty: two share the first."""
    source = write(tmp_path, [40, 0, 0, 30, 0, 20])
    seen = [
        sorted(names(make_lane(source, lane=lane, lanes=4, split=True).take(size)))
        for lane, size in enumerate((20, 30, 20, 20))
    ]
    assert sorted(name for lane in seen for name in lane) == all_names([40, 0, 0, 30, 0, 20])


def test_a_window_mixes_documents_over_shards(tmp_path: Path) -> None:
    lane = make_lane(write(tmp_path, [64] * 8), window=256)
    first = names(lane.take(64))
    assert len({name[:2] for name in first}) == 4


@pytest.mark.parametrize(("lane", "lanes"), [(0, 1), (1, 2), (3, 12)])
def test_resume_is_exact_from_every_place(tmp_path: Path, lane: int, lanes: int) -> None:
    """States in a window and at the ends of windows, shards and epochs, for over two epochs."""
    source = write(tmp_path, UNEVEN)
    uninterrupted = make_lane(source, lane=lane, lanes=lanes)
    states = [uninterrupted.state()]
    samples = []
    count = 2 * sum(UNEVEN[lane % 9 :: lanes]) // (2 if lanes > 9 else 1) + 40
    for _ in range(count):
        samples.append(uninterrupted.take(1)[0].tolist())
        states.append(uninterrupted.state())
    positions = [(state["epoch"], state["shard"], state["row"]) for state in states]
    edges = {n for n in range(1, count) if positions[n] != positions[n - 1]}
    assert len(edges) >= 2
    for n in sorted(set(range(0, count - 3, 25)) | {n + d for n in edges for d in (-1, 0, 1) if n + d <= count - 3}):
        resumed = make_lane(source, lane=lane, lanes=lanes, state=states[n])
        assert resumed.take(3).tolist() == samples[n : n + 3], n
        assert resumed.state() == states[n + 3]


def test_resume_is_exact_inside_and_at_the_edge_of_a_chunk(tmp_path: Path) -> None:
    """Documents have 20 kB, so that a window has several chunks, and samples hold parts of them."""
    source = write(tmp_path, [70, 70], length=20_000)
    uninterrupted = make_lane(source, seq_len=1000, window=64)
    states = [uninterrupted.state()]
    samples = []
    for _ in range(150):
        samples += uninterrupted.take(20).tolist()
        states.append(uninterrupted.state())
    chunks = {(state["shard"], state["row"], state["document"]) for state in states}
    assert len(chunks) >= 4
    for n in range(0, 149, 8):
        assert (
            make_lane(source, seq_len=1000, window=64, state=states[n]).take(20).tolist()
            == samples[20 * n : 20 * n + 20]
        )


def test_nothing_is_lost_or_repeated_where_documents_and_samples_do_not_match(tmp_path: Path) -> None:
    """The targets of one epoch are all documents' bytes and ends, for any window and seq_len."""
    source = write(tmp_path, UNEVEN, length=11)
    tokens = Counter(b"".join(name.ljust(11, "x").encode() for name in all_names(UNEVEN))) + Counter({256: sum(UNEVEN)})
    for seq_len in (13, 4, 26):
        total = sum(UNEVEN) * 12
        lane = make_lane(source, seq_len=seq_len, window=70)
        samples = lane.take(total // seq_len)
        missing = tokens - Counter(samples[:, 1:].ravel().tolist())
        assert Counter(samples[:, 1:].ravel().tolist()) - tokens == Counter()
        assert sum(missing.values()) == total % seq_len


def test_a_lane_without_documents_of_its_own_reads_those_of_all(tmp_path: Path) -> None:
    """Eight lanes over two documents and an empty shard; such a lane resumes exactly too."""
    source = write(tmp_path, [2, 0])
    lane = make_lane(source, lane=5, lanes=8)
    states = []
    samples = []
    for _ in range(6):
        samples.append(names(lane.take(1))[0])
        states.append(lane.state())
    assert [sorted(samples[i : i + 2]) for i in (0, 2, 4)] == [all_names([2])] * 3
    for n in range(5):
        assert names(make_lane(source, lane=5, lanes=8, state=states[n]).take(5 - n)) == samples[n + 1 :]


def test_no_document_at_all_is_an_error_that_names_the_files(tmp_path: Path) -> None:
    source = write(tmp_path, [5, 7])
    with pytest.raises(
        ValueError,
        match=r"source: lane 0 has no documents .*00.parquet, .*01.parquet.*: all are empty or held out",
    ):
        make_lane(source, held_out=0.999999, lanes=2).take(1)
