"""The number of rows of a language model's embedding."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.text.tokenizers import Tokenizer


def embedding_rows(vocab_size: int | None, tokenizer: "Tokenizer") -> int:
    """`vocab_size` rows; null: as many as the tokenizer has ids.

    Raises ValueError if there are fewer rows than ids.
    """
    ids = tokenizer.vocab_size
    if vocab_size is not None and vocab_size < ids:
        raise ValueError(
            f"run.objective.vocab_size: {vocab_size} is less than the {ids} ids of the tokenizer; "
            f"use {ids} or more, or null"
        )
    return vocab_size or ids
