"""Counter-based randomness for the order of data: a permutation is a function of its key.

No generator is saved. numpy does not promise that its generators keep their streams between
versions (NEP 19), and a resumed run must see the same order for years, so the mixing function is
written out here.
"""

import hashlib

import numpy as np
import numpy.typing as npt


def stable_hash(*parts: object) -> int:
    """A 64-bit hash of `parts`: the same in every process, machine and version, unlike `hash`."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def splitmix64(counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Output function of SplitMix64 (Steele, Lea and Flood 2014, figure 15), modulo 2^64."""
    z = counters * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(size: int, *key: object) -> npt.NDArray[np.intp]:
    """The order of `size` items under `key`: sorted by 64-bit random numbers, ties by index."""
    counters = np.arange(size, dtype=np.uint64) + np.uint64(stable_hash(*key))
    return np.argsort(splitmix64(counters), kind="stable")
