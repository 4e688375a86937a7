"""How many rows the embedding of a language model has."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.text.tokenizers import Tokenizer


def embedding_rows(vocab_size: int | None, tokenizer: "Tokenizer") -> int:
    """`vocab_size` rows, or as many as the tokenizer has ids. Raises ValueError if they are fewer than its ids."""
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        fix = f"use {tokenizer.vocab_size} or more, or null"
        raise ValueError(
            f"run.objective.vocab_size: {vocab_size} is less than the {tokenizer.vocab_size} ids of the tokenizer; {fix}"
        )
    return vocab_size or tokenizer.vocab_size
