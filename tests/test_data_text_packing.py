from collections.abc import Sequence

import numpy as np
import pytest

from data.text.packing import Tokens, join, segments, windows

EOD = 9


def all_windows(
    documents: Sequence[Sequence[int]], seq_len: int, carry: Sequence[int] = (EOD,)
) -> tuple[Tokens, Tokens]:
    return windows(join(np.array(carry, np.uint16), [np.array(d, np.uint8) for d in documents], EOD), seq_len)


def test_windows_against_a_drawing() -> None:
    packed, rest = all_windows([[1, 2, 3], [4], [5, 6, 7, 8]], seq_len=4)
    assert packed.tolist() == [[9, 1, 2, 3, 9], [9, 4, 9, 5, 6]]
    assert rest.tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize("seq_len", [1, 2, 5, 16, 1000])
def test_every_token_is_predicted_exactly_once_over_many_joins(seq_len: int) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 9, size=rng.integers(0, 12)).tolist() for _ in range(60)]
    targets = []
    inputs = []
    carry = [EOD]
    for start in range(0, 60, 7):
        packed, rest = all_windows(documents[start : start + 7], seq_len, carry)
        targets += packed[:, 1:].ravel().tolist()
        inputs += packed[:, :-1].ravel().tolist()
        carry = rest.tolist()
        assert 1 <= len(carry) <= seq_len
    stream = [EOD] + [token for document in documents for token in [*document, EOD]]
    assert targets + carry[1:] == stream[1:]
    assert inputs + carry == stream


def test_segments_change_at_each_end_of_document_and_begin_at_zero() -> None:
    tokens = np.array([[9, 1, 2, 9, 3, 9, 9, 4], [1, 2, 9, 3, 3, 3, 3, 9]])
    assert segments(tokens, EOD).tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0, 0, 1, 1, 1, 1, 1, 2]]
