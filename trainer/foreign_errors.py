"""Errors that torch and the system raise without a type of their own, recognised by their words. No other file reads words."""

_LOST_PEERS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
_NO_MEMORY = "allocate memory"


def is_lost_peer(text: str) -> bool:
    """Whether an error says that a collective failed, which happens to all ranks when one of them ends."""
    return any(words in text for words in _LOST_PEERS)


def is_out_of_memory(text: str) -> bool:
    """Whether an error says that the system has no memory left: torch's CPU allocator raises a plain RuntimeError."""
    return _NO_MEMORY in text
