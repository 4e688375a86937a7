import dataclasses
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data.config import TextConfig
from data.share import Share
from data.sources.kinds import Files
from data.text.documents import Documents
from data.text.held_out import held_out, held_out_documents, xz_bits_per_byte
from data.training_stream import TextStream

WORDS = "the cat sat on the mat and a dog naïve café".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for shard in range(5):
        texts = [
            " ".join([f"{shard}.{row}", *rng.choice(WORDS, rng.integers(0, 9))]) if row % 11 else ""
            for row in range(80)
        ]
        pq.write_table(
            pa.table({"text": texts, "url": [f"u{row // 4}" for row in range(80)]}), folder / f"{shard}.parquet"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(
        [" ".join(WORDS)] * 9,
        trainers.BpeTrainer(
            vocab_size=290, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def config(folder: Path) -> TextConfig:
    return TextConfig(source=Files(paths=(str(folder / "*.parquet"),)), seq_len=16, held_out=0.2, lanes=4)


def whole(config: TextConfig, world: int = 1, micro_batch: int = 4) -> dict[str, npt.NDArray[np.generic]]:
    """All samples in order, by name, without the padded ones."""
    batches = [held_out(config, rank=rank, world=world, micro_batch=micro_batch) for rank in range(world)]
    assert len({len(rank) for rank in batches}) == 1
    assert all(batch["tokens"].shape == (micro_batch, config.seq_len + 1) for rank in batches for batch in rank)
    joined = {
        name: np.concatenate([batch[name].numpy() for rank in batches for batch in rank]) for name in batches[0][0]
    }
    order = np.argsort(joined["sample"])
    assert joined["sample"][order].tolist() == list(range(len(order)))
    real = joined["mask"].any(axis=1)
    assert joined["bytes"][~real].sum() == 0
    return {name: values[order][real[order]] for name, values in joined.items()}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_byte_of_every_held_out_document_counts_once(config: TextConfig, folder: Path, tokenizer: str) -> None:
    config = dataclasses.replace(config, tokenizer=str(folder) if tokenizer == "bpe" else tokenizer)
    documents = list(held_out_documents(config))
    samples = whole(config)
    assert 30 < len(documents) < 130
    assert samples["bytes"].sum() == sum(len(document.encode()) for document in documents)
    targets = samples["tokens"][:, 1:][samples["mask"]]
    eod = 256 if tokenizer == "bytes" else 0
    assert (targets == eod).sum() == len(documents)
    if tokenizer == "bytes":
        assert bytes(targets[targets < 256].tolist()) == "".join(documents).encode()
        assert samples["bytes"].tolist() == ((samples["tokens"][:, 1:] < 256) & samples["mask"]).sum(1).tolist()
    assert samples["tokens"][0, 0] == eod
    assert (samples["tokens"][1:, 0] == samples["tokens"][:-1, -1]).all()


@pytest.mark.parametrize(("world", "micro_batch"), [(2, 4), (3, 7), (4, 64)])
def test_the_same_set_for_every_world(config: TextConfig, world: int, micro_batch: int) -> None:
    alone = whole(config)
    shared = whole(config, world, micro_batch)
    assert all((alone[name] == shared[name]).all() for name in alone)


def test_training_and_held_out_documents_are_all_documents_and_none_twice(config: TextConfig, folder: Path) -> None:
    """By the bytes of one whole epoch, each document being told from the others by its number."""
    everything = Counter(
        text for path in folder.glob("*.parquet") for text in pq.read_table(path)["text"].to_pylist() if text
    )
    kept = Counter(held_out_documents(config))
    assert kept - everything == Counter()
    trained = everything - kept
    epoch = sum(len(text.encode()) + 1 for text in trained.elements())
    with TextStream(
        dataclasses.replace(config, lanes=1, seq_len=1),
        Share(rank=0, world=1, global_batch=epoch, micro_batch=epoch),
        seed=0,
    ) as stream:
        tokens = next(stream).micro_batches[0]["tokens"]
    assert Counter(tokens[:, 1].tolist()) == Counter("".join(trained.elements()).encode()) + Counter(
        {256: trained.total()}
    )


def test_the_share_is_what_was_asked_for_and_larger_shares_hold_the_smaller() -> None:
    table = pa.table({"text": [f"document {i}" for i in range(20_000)]})
    sets = []
    for share in (0.0, 0.02, 0.5):
        documents = Documents(text_column="text", key_column="text", held_out=share)
        seen, rest = (
            {text.tobytes() for text in texts} for texts in (documents.held_out(table), documents.training(table))
        )
        assert not seen & rest
        assert len(seen) + len(rest) == 20_000
        assert abs(len(seen) - share * 20_000) <= 4 * np.sqrt(share * (1 - share) * 20_000)
        sets.append(seen)
    assert sets[0] < sets[1] < sets[2]


def test_documents_of_one_key_stay_together(config: TextConfig, folder: Path) -> None:
    config = dataclasses.replace(config, key_column="url", held_out=0.5)
    kept = set(held_out_documents(config))
    rows = [row for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist() if row["text"]]
    sides = {}
    for row in rows:
        sides.setdefault(row["url"], set()).add(row["text"] in kept)
    assert all(len(side) == 1 for side in sides.values())
    assert len(set(map(frozenset, sides.values()))) == 2


def test_max_eval_samples_is_a_beginning_of_all(config: TextConfig) -> None:
    everything = whole(config)
    first = whole(dataclasses.replace(config, max_eval_samples=10))
    assert len(first["sample"]) == 10
    assert all((everything[name][:10] == first[name]).all() for name in everything)
    assert first["mask"].all()
    documents = list(held_out_documents(dataclasses.replace(config, max_eval_samples=10)))
    assert documents == list(held_out_documents(config))[: len(documents)]
    assert (
        sum(len(document.encode()) + 1 for document in documents[:-1])
        < 160
        <= sum(len(document.encode()) + 1 for document in documents)
    )


def test_an_eval_source_is_evaluated_whole_and_trained_on_whole(
    config: TextConfig, folder: Path, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"text": ["one document", "and another"]}), tmp_path / "eval.parquet")
    config = dataclasses.replace(config, eval_source=Files(paths=(str(tmp_path / "eval.parquet"),)))
    assert list(held_out_documents(config)) == ["one document", "and another"]
    assert config.training_held_out == 0.0


def test_nothing_held_out(config: TextConfig) -> None:
    assert held_out(dataclasses.replace(config, held_out=0.0), rank=0, world=1, micro_batch=2) == []
    with pytest.raises(
        ValueError,
        match=r"^run.objective.data.held_out: 1e-09: no document .*; use a larger share, or name .*eval_source$",
    ):
        held_out(dataclasses.replace(config, held_out=1e-9), rank=0, world=1, micro_batch=2)


def test_document_mask_gives_segments(config: TextConfig) -> None:
    batch = held_out(dataclasses.replace(config, document_mask=True), rank=0, world=1, micro_batch=4)[0]
    assert batch["segments"].shape == batch["tokens"].shape
    assert (batch["segments"].diff(dim=1) == (batch["tokens"][:, 1:] == 256)).all()


@pytest.mark.skipif(shutil.which("xz") is None, reason="compares with the program xz")
def test_xz_is_what_xz_makes_of_it() -> None:
    documents = ["a" * 1000, "naïve " * 50]
    texts = [document.encode() for document in documents]
    packed = [
        len(subprocess.run(["xz", "-9", "-c"], input=text, capture_output=True, check=True).stdout)
        for text in [b"".join(texts), *texts]
    ]
    size = sum(map(len, texts))
    assert xz_bits_per_byte(documents) == (8 * packed[0] / size, 8 * (packed[1] + packed[2]) / size)


def test_xz_of_nothing_is_one_line() -> None:
    with pytest.raises(ValueError, match="no held-out text"):
        xz_bits_per_byte([])
