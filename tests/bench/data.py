"""Tokens and images per second of the streams, next to `datasets` and a bare loop over arrow.

    python tests/bench/data.py [--json FILE] [--rounds 9] [--seq-len 1024]
                               [--document-bytes 3000] [--image-side 32]

All sides read the same parquet shards on one thread and give the same kind of micro-batches: bytes
of documents, packed, as int64; PNGs, decoded by Pillow, as uint8. The streams add the price of
exactness: lanes, shuffling of documents and samples, held-out documents, states, digests. `rows` is
the loop that one writes without thinking: `for row in dataset`. The images are all different, and
none comes twice, so no side profits from a cache. Ratios are taken within a round.
"""

import io
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import paired
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # else `data` would be this very file

from data.config import ImageConfig, TextConfig
from data.share import Share
from data.sources.arrow import views
from data.sources.builtin import stdlib_shards
from data.sources.kinds import Files
from data.text.documents import column
from data.text.packing import join
from data.text.tokenizers import texts_of
from data.training_stream import ImageStream, TextStream

GLOBAL_BATCH = 64
MICRO_BATCH = 16
SHARDS = 8
SPLIT = {"global_batch": GLOBAL_BATCH, "micro_batch": MICRO_BATCH}


def write_texts(folder: Path, document_bytes: int) -> list[str]:
    """Write eight shards of standard-library source, cut into documents of about one size.

    A shard has about 10 MB.
    """
    texts = [text for shard in stdlib_shards() for text in pq.read_table(shard)["text"].to_pylist()]
    documents = [text[i : i + document_bytes] for text in texts for i in range(0, len(text), document_bytes)]
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        order = rng.permutation(len(documents))
        pq.write_table(
            pa.table({"text": [documents[i] for i in order]}), folder / f"{shard}.parquet", row_group_size=1000
        )
    return sorted(str(path) for path in folder.glob("*.parquet"))


def write_images(folder: Path, count: int, side: int) -> list[str]:
    """Eight shards of PNGs of smooth noise: `count` different ones."""
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        encoded = []
        for _ in range(count // SHARDS):
            small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            file = io.BytesIO()
            small.resize((side, side), Image.Resampling.BICUBIC).save(file, "PNG")
            encoded.append({"bytes": file.getvalue(), "path": None})
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        part = datasets.Dataset.from_dict({"image": encoded, "label": [0] * len(encoded)}, features=features)
        pq.write_table(
            part.data.table.replace_schema_metadata(part.features.arrow_schema.metadata),
            folder / f"{shard}.parquet",
            row_group_size=1000,
        )
    return sorted(str(path) for path in folder.glob("*.parquet"))


def packed(columns: Iterable[list[np.ndarray]], seq_len: int) -> Iterator[list[torch.Tensor]]:
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


def stacked(images: Iterable[np.ndarray]) -> Iterator[list[torch.Tensor]]:
    """Micro-batches of decoded images (H, W, C), as (m, C, H, W)."""
    source = iter(images)
    while batch := list(itertools.islice(source, GLOBAL_BATCH)):
        tensor = torch.from_numpy(np.ascontiguousarray(np.stack(batch).transpose(0, 3, 1, 2)))
        yield [tensor[i : i + MICRO_BATCH] for i in range(0, GLOBAL_BATCH, MICRO_BATCH)]


def plain(files: list[str], rows: int) -> Iterator[pa.Table]:
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True).with_format("arrow")
    return (table for _ in itertools.count() for table in dataset.iter(rows))


def by_row(files: list[str]) -> Iterator[dict]:
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    return (row for _ in itertools.count() for row in dataset)


def arrow(files: list[str], name: str, rows: int) -> Iterator[pa.Array]:
    return (
        batch.column(0)
        for _ in itertools.count()
        for file in files
        for batch in pq.ParquetFile(file).iter_batches(rows, use_threads=False, columns=[name])
    )


def decoded(array: pa.Array) -> Iterator[np.ndarray]:
    return (np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in views(array.field("bytes")))


def text_sides(files: list[str], seq_len: int) -> dict[str, Iterator[object]]:
    config = TextConfig(source=Files(paths=tuple(files)), seq_len=seq_len, lanes=SHARDS, prefetch=0)
    return {
        "stream": TextStream(config, Share(rank=0, world=1, **SPLIT), seed=0),
        "plain": packed((column(table, "text") for table in plain(files, 1000)), seq_len),
        "arrow": packed(map(texts_of, arrow(files, "text", 1000)), seq_len),
        "rows": packed(([np.frombuffer(row["text"].encode(), np.uint8)] for row in by_row(files)), seq_len),
    }


def image_sides(files: list[str]) -> dict[str, Iterator[object]]:
    config = ImageConfig(source=Files(paths=tuple(files)), channels=3, lanes=SHARDS, prefetch=0)
    tables = (chunk for table in plain(files, 256) for chunk in table.column("image").chunks)
    return {
        "stream": ImageStream(config, Share(rank=0, world=1, **SPLIT), seed=0),
        "plain": stacked(image for array in tables for image in decoded(array)),
        "arrow": stacked(image for array in arrow(files, "image", 256) for image in decoded(array)),
        "rows": stacked(np.asarray(row["image"].convert("RGB")) for row in by_row(files)),
    }


def taking(iterator: Iterator[object], steps: int) -> Callable[[], None]:
    def take() -> None:
        for _ in range(steps):
            next(iterator)

    return take


def report(what: str, sides: dict[str, Iterator[object]], steps: int, rounds: int, per_step: int) -> dict[str, object]:
    """Run and print one comparison; returns what goes into the JSON file."""
    seconds = paired.in_turn({name: taking(iterator, steps) for name, iterator in sides.items()}, rounds)
    print(f"thousand {what} per second")
    paired.show(
        {name: [steps * per_step / value / 1e3 for value in values] for name, values in seconds.items()},
        unit=1.0,
        name="k/s",
    )
    ratios = {
        name: [theirs / ours for ours, theirs in zip(seconds["stream"], values, strict=True)]
        for name, values in seconds.items()
        if name != "stream"
    }
    for name, values in ratios.items():
        print(f"  stream / {name:6} {statistics.median(values):.3f}   ({min(values):.3f} to {max(values):.3f})")
    rates = {name: [steps * per_step / value for value in values] for name, values in seconds.items()}
    return {
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratios": ratios,
        f"{what}_per_second": rates,
    }


def main() -> None:
    parser = paired.arguments(__doc__, rounds=9)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--document-bytes", type=int, default=3000)
    parser.add_argument("--image-side", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "texts").mkdir()
        (Path(folder) / "images").mkdir()
        texts = text_sides(write_texts(Path(folder) / "texts", options.document_bytes), options.seq_len)
        result = {"text": report("tokens", texts, 1000, options.rounds, GLOBAL_BATCH * options.seq_len)}
        steps = 150
        rounds = -(-options.rounds // 2)  # fewer and longer: a lane decodes some hundred images at a time
        images = image_sides(
            write_images(Path(folder) / "images", int(1.3 * (rounds + 1) * steps * GLOBAL_BATCH), options.image_side)
        )
        result["images"] = report("images", images, steps, rounds, GLOBAL_BATCH)
    paired.write(options.json, result)


if __name__ == "__main__":
    main()
