"""Recognises errors of torch and of the system that have no type of their own, by their words.

No other file decides by the words of an error.
"""

_LOST_PEERS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
_NO_MEMORY = "allocate memory"


def is_lost_peer(text: str) -> bool:
    """Whether an error says that a collective failed, as on all ranks when one of them ends."""
    return any(words in text for words in _LOST_PEERS)


def is_out_of_memory(text: str) -> bool:
    """Whether an error says that the system is out of memory.

    torch's CPU allocator raises a plain RuntimeError.
    """
    return _NO_MEMORY in text
