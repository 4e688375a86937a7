"""Tokens per second of TextStream against plain `datasets` iteration and a bare loop over arrow, doing the same work but for exactness.

    python tests/bench/data.py [--json FILE] [--seq-len 1024] [--rounds 9] [--document-bytes 3000]

All sides read the same parquet shards on one thread, make bytes of documents, pack them and give int64 micro-batches. TextStream adds
what exactness costs: lanes, shuffling of documents and samples, held-out documents, states. `rows` is what one writes without
thinking: `for row in dataset`. Each round runs all sides, in turn; ratios are taken within a round.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # else `data` would be this very file

from data.documents import column
from data.packing import join
from data.sources import Files
from data.stdlib import stdlib_shards
from data.stream import TextStream
from data.text import TextConfig
from data.tokenizers import texts_of

GLOBAL_BATCH, MICRO_BATCH, SHARDS = 64, 16, 8


def write_corpus(folder: Path, document_bytes: int) -> list[str]:
    """Eight shards of standard-library source, cut into documents of about one size: 10 MB each or so."""
    texts = [text for shard in stdlib_shards() for text in pq.read_table(shard)["text"].to_pylist()]
    documents = [text[i : i + document_bytes] for text in texts for i in range(0, len(text), document_bytes)]
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        order = rng.permutation(len(documents))
        pq.write_table(pa.table({"text": [documents[i] for i in order]}), folder / f"{shard}.parquet", row_group_size=1000)
    return sorted(str(path) for path in folder.glob("*.parquet"))


def batches(columns: Iterable[list[np.ndarray]], seq_len: int) -> Iterator[list[torch.Tensor]]:
    """Micro-batches of packed documents, with as few copies as can be and no care for resuming."""
    rest = np.array([256], np.uint16)
    for documents in columns:
        stream = join(rest, documents, 256)
        count = (len(stream) - 1) // (seq_len * GLOBAL_BATCH) * GLOBAL_BATCH
        rest = stream[count * seq_len :]
        if count:
            windows = np.lib.stride_tricks.sliding_window_view(stream, seq_len + 1)[::seq_len]
            for first in range(0, count, GLOBAL_BATCH):
                batch = windows[first : first + GLOBAL_BATCH].astype(np.int64)
                yield [torch.from_numpy(batch[i : i + MICRO_BATCH]) for i in range(0, GLOBAL_BATCH, MICRO_BATCH)]


def plain(files: list[str]) -> Iterator[list[np.ndarray]]:
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True).with_format("arrow")
    return (column(table, "text") for _ in itertools.count() for table in dataset.iter(1000))


def rows(files: list[str]) -> Iterator[list[np.ndarray]]:
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    return ([np.frombuffer(row["text"].encode(), np.uint8)] for _ in itertools.count() for row in dataset)


def arrow(files: list[str]) -> Iterator[list[np.ndarray]]:
    return (
        texts_of(batch.column(0))
        for _ in itertools.count()
        for file in files
        for batch in pq.ParquetFile(file).iter_batches(1000, use_threads=False, columns=["text"])
    )


def seconds(side: Callable[[], object], steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        side()
    return time.perf_counter() - began


def measure(seq_len: int, rounds: int, document_bytes: int, steps: int) -> dict[str, list[float]]:
    """Tokens per second of each side, round by round."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_corpus(Path(folder), document_bytes)
        config = TextConfig(source=Files(paths=tuple(files)), seq_len=seq_len, lanes=SHARDS, prefetch=0)
        stream = TextStream(config, seed=0, rank=0, world=1, global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH)
        iterators: dict[str, Iterator[object]] = {
            "stream": stream,
            "plain": batches(plain(files), seq_len),
            "arrow": batches(arrow(files), seq_len),
            "rows": batches(rows(files), seq_len),
        }
        sides = {name: iterator.__next__ for name, iterator in iterators.items()}
        for side in sides.values():
            seconds(side, steps)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in list(sides)[:: 1 if number % 2 else -1]:
                rates[name].append(steps * GLOBAL_BATCH * seq_len / seconds(sides[name], steps))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--document-bytes", type=int, default=3000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates = measure(options.seq_len, options.rounds, options.document_bytes, options.steps)
    for name, samples in rates.items():
        print(f"{name:7} {statistics.median(samples) / 1e6:7.1f} Mtoken/s  (from {min(samples) / 1e6:.1f} to {max(samples) / 1e6:.1f})")
    ratios = {name: [mine / theirs for mine, theirs in zip(rates["stream"], rates[name])] for name in rates if name != "stream"}
    for name, samples in ratios.items():
        print(f"stream / {name:5} {statistics.median(samples):.3f}  (from {min(samples):.3f} to {max(samples):.3f})")
    if options.json:
        result = {"ratio": statistics.median(ratios["plain"]), "ratios": ratios, "tokens_per_second": rates}
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
