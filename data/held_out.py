"""Held-out documents as fixed samples: the same set for every world size, every byte predicted exactly once.

They are read in a fixed order, without windows or lanes, and packed as training documents are (packing.py); the first
context token is `eod`. The last window is filled up, and so is the last batch of each rank, with targets that do not count.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from data.documents import Documents
from data.packing import Tokens, segments
from data.scan import scan
from data.sources import Plain
from data.steps import Batch
from data.text import TextConfig
from data.tokenizers import Text, Tokenizer, load_tokenizer


def held_out(config: TextConfig, *, rank: int, world: int, micro_batch: int) -> list[Batch]:
    """This rank's share of the held-out samples, in as many batches as every other rank has; none without `held_out` and `eval_source`.

    Each has "tokens" int64 (m, S + 1), "sample" int64 (m,): the place among the held-out samples, "mask" bool (m, S): the targets that count,
    "bytes" float64 (m,): the source bytes that they stand for, and with `document_mask` "segments" like "tokens".
    A document's bytes are spread evenly over its tokens; `eod` stands for none.
    Raises ValueError where no document is held out.
    """
    import torch

    if config.eval_source is None and config.held_out == 0.0:
        return []
    tokenizer = load_tokenizer(config.tokenizer)
    tokens_NW, mask_NS, bytes_N = _samples(config, tokenizer)
    each = -(-len(tokens_NW) // (world * micro_batch))
    places = (np.arange(each)[:, None] * world + rank) * micro_batch + np.arange(micro_batch)
    batches: list[Batch] = []
    for place_M in places:
        there_M = place_M < len(tokens_NW)
        kept_M = np.where(there_M, place_M, 0)
        tokens_MW = tokens_NW[kept_M]
        arrays = {"tokens": tokens_MW, "sample": place_M, "mask": mask_NS[kept_M] & there_M[:, None], "bytes": bytes_N[kept_M] * there_M}
        if config.document_mask:
            arrays["segments"] = segments(tokens_MW, tokenizer.eod)
        batches.append({name: torch.from_numpy(array) for name, array in arrays.items()})
    return batches


def held_out_documents(config: TextConfig) -> Iterator[str]:
    """The documents that `held_out` covers, in its order; the last one whole, even where `max_eval_samples` cuts it."""
    for text, _ in _documents(config, load_tokenizer(config.tokenizer)):
        yield text.tobytes().decode()


def _samples(config: TextConfig, tokenizer: Tokenizer) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """(tokens (N, S + 1), mask (N, S), bytes (N,)) of all held-out samples."""
    streams: list[Tokens] = []
    weights: list[npt.NDArray[np.int64]] = []
    for text, tokens in _documents(config, tokenizer):
        streams.append(np.append(tokens.astype(np.int64), tokenizer.eod))
        weights.append(_spread(len(text), len(tokens)))
    if not streams:
        raise ValueError(f"data.held_out = {config.held_out}: no document of the source falls into that share; raise it, or name a data.eval_source")
    most = (config.max_eval_samples or np.iinfo(np.int64).max // config.seq_len) * config.seq_len
    target_T, weight_T = np.concatenate(streams)[:most], np.concatenate(weights)[:most]
    missing = -len(target_T) % config.seq_len
    target_NS = np.pad(target_T, (0, missing), constant_values=tokenizer.eod).reshape(-1, config.seq_len)
    mask_NS = np.pad(np.ones(len(target_T), np.bool_), (0, missing)).reshape(target_NS.shape)
    weight_NS = np.pad(weight_T, (0, missing)).reshape(target_NS.shape)
    first_N = np.concatenate([[tokenizer.eod], target_NS[:-1, -1]])
    return np.concatenate([first_N[:, None], target_NS], axis=1), mask_NS, weight_NS.sum(axis=1).astype(np.float64)


def _spread(size: int, tokens: int) -> npt.NDArray[np.int64]:
    """`size` bytes over `tokens` tokens and then `eod`, in whole numbers of the same sum, (tokens + 1,)."""
    if tokens == 0:
        return np.array([size])
    return np.append(np.diff(size * np.arange(tokens + 1, dtype=np.int64) // tokens), 0)


def _documents(config: TextConfig, tokenizer: Tokenizer) -> Iterator[tuple[Text, Tokens]]:
    """(text, token ids) of the held-out documents, as many as max_eval_samples asks for."""
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
    columns: Callable[[Plain], list[str]] = (lambda _: config.eval_columns) if config.eval_source else config.columns
    for table, _, part in scan(config.eval_source or config.source, columns, retry_seconds=config.retry_seconds, skip=config.on_unreadable == "skip"):
        documents = Documents(text_column=config.text_column, key_column=config.key(part), held_out=config.training_held_out)
        if texts := documents.all(table) if config.eval_source else documents.held_out(table):
            yield texts
