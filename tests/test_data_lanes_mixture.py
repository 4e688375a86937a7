import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter
from streams import stream_samples

from data.config import ImageConfig, TextConfig
from data.manifest import manifest
from data.prepare import prepare
from data.sources.kinds import Digits, Files, Mixture, Part, absolute, parts_of
from data.text.held_out import held_out_documents


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    """Three parts, of the letters a, b and c.

    b has an uneven and an empty shard, c one shard of six documents.
    """
    folder = tmp_path_factory.mktemp("mixture")
    parts = []
    for letter, weight, sizes in (("a", 5.0, [60, 70, 80]), ("b", 3.0, [90, 0, 3]), ("c", 2.0, [6])):
        for shard, size in enumerate(sizes):
            texts = pa.array([letter * (5 + row % 9) for row in range(size)], pa.string())
            pq.write_table(pa.table({"text": texts}), folder / f"{letter}{shard}.parquet")
        parts.append(Part(weight=weight, source=Files(paths=(str(folder / f"{letter}*.parquet"),))))
    return TextConfig(source=Mixture(parts=tuple(parts)), seq_len=16, lanes=4, window=20, held_out=0.0, prefetch=2)


def letters(sample: bytes) -> set[str]:
    return {chr(token) for token in np.frombuffer(sample, np.int64) if token < 256}


@pytest.mark.parametrize("kind", ["text", "mixture", "images"])
def test_the_same_global_batches_for_every_world_and_over_restarts(config: TextConfig, kind: str) -> None:
    """4 -> 2 -> 8 -> 1 ranks, stopped at random steps, the second attempt with prefetch processes.

    The smaller parts go through several epochs.
    """
    match kind:
        case "text":
            config = dataclasses.replace(config, source=config.source.parts[0].source, lanes=8)
        case "mixture":
            config = dataclasses.replace(config, source=Mixture(parts=config.source.parts[:2]), lanes=8)
        case "images":
            config = ImageConfig(
                source=Mixture(parts=(Part(weight=1, source=Digits()), Part(weight=2, source=Digits()))),
                lanes=8,
                flip=True,
            )
    alone, last = stream_samples(config, 1, 40, global_batch=32)
    cuts = sorted(np.random.default_rng(len(kind)).choice(np.arange(1, 40), 3, replace=False).tolist())
    resumed = {}
    state = None
    for world, begin, end in zip((4, 2, 8, 1), (0, *cuts), (*cuts, 40), strict=True):
        attempt = dataclasses.replace(config, processes=1 if world == 2 else 0)
        samples, state = stream_samples(attempt, world, end - begin, state, global_batch=32)
        assert not resumed.keys() & samples.keys()
        resumed |= samples
    assert resumed == alone
    assert state == last


def test_each_sample_is_of_one_part_and_the_shares_are_the_weights(config: TextConfig) -> None:
    samples, _ = stream_samples(config, 1, 250)
    seen = [letters(sample) for sample in samples.values()]
    assert all(len(letters_seen) == 1 for letters_seen in seen)
    counts = Counter("".join(map("".join, seen)))
    for letter, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
        assert abs(counts[letter] - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5


def test_epochs_of_the_parts_are_independent(config: TextConfig) -> None:
    _, state = stream_samples(config, 1, 40)
    epochs = [max(lane["parts"][part]["epoch"] for lane in state["lanes"].values()) for part in range(3)]
    assert epochs[2] > epochs[0]


def test_a_part_gives_what_it_gives_alone_but_for_the_order(config: TextConfig) -> None:
    """In one epoch of its own, each token as often as it stands in the source."""
    only = dataclasses.replace(config, source=Mixture(parts=config.source.parts[2:]), lanes=1, seq_len=1)
    total = sum(5 + row + 1 for row in range(6))
    samples, _ = stream_samples(only, 1, 1, global_batch=total, micro_batch=total)
    targets = Counter(int(np.frombuffer(sample, np.int64)[1]) for sample in samples.values())
    assert targets == {ord("c"): total - 6, 256: 6}


def test_held_out_documents_are_those_of_all_parts(config: TextConfig) -> None:
    split = dataclasses.replace(config, held_out=0.3)
    alone = [
        list(held_out_documents(dataclasses.replace(split, source=part.source))) for part in config.source.parts[:2]
    ]
    both = dataclasses.replace(split, source=Mixture(parts=config.source.parts[:2]))
    assert list(held_out_documents(both)) == [*alone[0], *alone[1]]


def test_the_config_is_parsed_from_plain_values_and_made_absolute(tmp_path: Path) -> None:
    parts = [
        {"weight": 2, "source": {"name": "python_stdlib"}},
        {"weight": 1, "source": {"name": "files", "paths": ["x.parquet"]}},
    ]
    parsed = TypeAdapter(TextConfig).validate_python({"source": {"name": "mixture", "parts": parts}})
    assert [part.weight for part in parts_of(parsed.source)] == [2, 1]
    assert absolute(parsed.source, tmp_path).parts[1].source.paths == (f"{tmp_path}/x.parquet",)


def test_prepare_and_manifest_look_at_every_part(config: TextConfig, tmp_path: Path) -> None:
    prepare(config)
    source = manifest(config)["source"]
    assert [file["weight"] for file in source] == [5.0] * 3 + [3.0] * 3 + [2.0]
    assert source[0]["name"].startswith("part 0: ")
    bad = dataclasses.replace(
        config,
        source=Mixture(parts=(*config.source.parts, Part(weight=1, source=Files(paths=(f"{tmp_path}/none.parquet",))))),
    )
    with pytest.raises(ValueError, match=r"^run.objective.data.source.paths: no such file"):
        prepare(bad)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^weight is {weight}; it must be above 0"):
            Part(weight=weight, source=Digits())
    with pytest.raises(ValueError, match=r"^parts is empty"):
        Mixture(parts=())
