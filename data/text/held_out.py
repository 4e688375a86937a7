"""Held-out documents as fixed samples: the same for every world size, every byte predicted once.

Documents are read in a fixed order, without windows or lanes, and packed as training documents are
(packing.py). The first context token is `eod`. The last window, and the last batch of each rank,
are filled up with targets that do not count.

Legend: N samples, M samples of a micro-batch, S = seq_len, W = S + 1, T tokens.
"""

import lzma
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.config import TextConfig
from data.lanes.rows import scan
from data.share import Batch
from data.sources.kinds import Plain
from data.text.documents import Documents
from data.text.packing import Tokens, segments
from data.text.tokenizers import Text, Tokenizer, load_tokenizer


class HeldOut(NamedTuple):
    """All held-out samples."""

    tokens_NW: npt.NDArray[np.int64]
    mask_NS: npt.NDArray[np.bool_]
    """The targets that count."""
    bytes_N: npt.NDArray[np.float64]
    """The source bytes that a sample's targets stand for."""


def held_out(config: TextConfig, *, rank: int, world: int, micro_batch: int) -> list[Batch]:
    """This rank's held-out samples, in as many batches as every other rank has.

    A batch has "tokens" int64 (m, S + 1); "sample" int64 (m,), the index among the held-out
    samples; "mask" bool (m, S), the targets that count; "bytes" float64 (m,), the source bytes that
    the targets stand for; and with `document_mask` "segments", like "tokens". A document's bytes
    are spread evenly over its tokens; `eod` has none.

    Empty without `held_out` and `eval_source`. Raises ValueError if no document is held out.
    """
    import torch

    if config.eval_source is None and config.held_out == 0.0:
        return []
    tokenizer = load_tokenizer(config.tokenizer)
    samples = _samples(config, tokenizer)
    count = len(samples.tokens_NW)
    batches: list[Batch] = []
    for index_M in batch_indices(count, rank=rank, world=world, micro_batch=micro_batch):
        real_M = index_M < count
        kept_M = np.where(real_M, index_M, 0)
        tokens_MW = samples.tokens_NW[kept_M]
        arrays = {
            "tokens": tokens_MW,
            "sample": index_M,
            "mask": samples.mask_NS[kept_M] & real_M[:, None],
            "bytes": samples.bytes_N[kept_M] * real_M,
        }
        if config.document_mask:
            arrays["segments"] = segments(tokens_MW, tokenizer.eod)
        batches.append({name: torch.from_numpy(array) for name, array in arrays.items()})
    return batches


def batch_indices(count: int, *, rank: int, world: int, micro_batch: int) -> npt.NDArray[np.int64]:
    """The sample indices of this rank's batches, (batches, m); from `count` on, padding."""
    batches = -(-count // (world * micro_batch))
    starts = (np.arange(batches, dtype=np.int64) * world + rank) * micro_batch
    return starts[:, None] + np.arange(micro_batch, dtype=np.int64)


def held_out_documents(config: TextConfig) -> Iterator[str]:
    """The documents of `held_out`, in its order; the last one whole, even if it is cut there."""
    for text, _ in _documents(config, load_tokenizer(config.tokenizer)):
        yield text.tobytes().decode()


def _samples(config: TextConfig, tokenizer: Tokenizer) -> HeldOut:
    streams: list[npt.NDArray[np.int64]] = []
    weights: list[npt.NDArray[np.int64]] = []
    for text, tokens in _documents(config, tokenizer):
        streams.append(np.append(tokens.astype(np.int64), tokenizer.eod))
        weights.append(_spread(len(text), len(tokens)))
    if not streams:
        problem = f"{config.held_out}: no document of the source falls into that share"
        fix = "use a larger share, or name run.objective.data.eval_source"
        raise ValueError(f"run.objective.data.held_out: {problem}; {fix}")
    limit = (config.max_eval_samples or np.iinfo(np.int64).max // config.seq_len) * config.seq_len
    target_T = np.concatenate(streams)[:limit]
    weight_T = np.concatenate(weights)[:limit]
    missing = -len(target_T) % config.seq_len
    target_NS = np.pad(target_T, (0, missing), constant_values=tokenizer.eod).reshape(-1, config.seq_len)
    mask_NS = np.pad(np.ones(len(target_T), np.bool_), (0, missing)).reshape(target_NS.shape)
    weight_NS = np.pad(weight_T, (0, missing)).reshape(target_NS.shape)
    first_N = np.concatenate([[tokenizer.eod], target_NS[:-1, -1]])
    tokens_NW = np.concatenate([first_N[:, None], target_NS], axis=1)
    return HeldOut(tokens_NW, mask_NS, weight_NS.sum(axis=1).astype(np.float64))


def _spread(size: int, tokens: int) -> npt.NDArray[np.int64]:
    """`size` bytes spread over `tokens` tokens and `eod`, as whole numbers, (tokens + 1,)."""
    if tokens == 0:
        return np.array([size])
    return np.append(np.diff(size * np.arange(tokens + 1, dtype=np.int64) // tokens), 0)


def _documents(config: TextConfig, tokenizer: Tokenizer) -> Iterator[tuple[Text, Tokens]]:
    """(text, token ids) of the held-out documents, as many as max_eval_samples needs."""
    left = config.max_eval_samples * config.seq_len if config.max_eval_samples else None
    for texts in _texts(config):
        for text, tokens in zip(texts, tokenizer.encode(texts), strict=True):
            yield text, tokens
            if left is not None:
                left -= len(tokens) + 1
                if left <= 0:
                    return


def _texts(config: TextConfig) -> Iterator[list[Text]]:
    """The held-out texts, table by table."""
    source = config.eval_source or config.source
    columns: Callable[[Plain], list[str]] = config.columns
    if config.eval_source:
        columns = lambda _: config.eval_columns  # noqa: E731
    skip = config.on_unreadable == "skip"
    for table, _, part in scan(source, columns, retry_seconds=config.retry_seconds, skip=skip):
        key_column = config.key(part)
        documents = Documents(text_column=config.text_column, key_column=key_column, held_out=config.training_held_out)
        if texts := documents.all(table) if config.eval_source else documents.held_out(table):
            yield texts


def xz_bits_per_byte(documents: Iterable[str]) -> tuple[float, float]:
    """Bits per byte of `xz -9` on `documents`: (all in one file, each in its own).

    Raises ValueError if there is no text.
    """
    texts = [document.encode() for document in documents]
    size = sum(map(len, texts))
    if not size:
        fix = "use a larger share, or name run.objective.data.eval_source"
        raise ValueError(f"run.objective.data.held_out: no held-out text to compress; {fix}")
    together = len(lzma.compress(b"".join(texts), preset=9))
    one_by_one = sum(len(lzma.compress(text, preset=9)) for text in texts)
    return 8 * together / size, 8 * one_by_one / size
