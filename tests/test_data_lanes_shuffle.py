import subprocess
import sys

import numpy as np

from data.lanes.shuffle import permutation, splitmix64, stable_hash


def test_splitmix64_against_its_published_outputs() -> None:
    """The first outputs for seed 0 are those of Vigna's reference code.

    The n-th output mixes n times the golden gamma.
    """
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert splitmix64(np.arange(1, 5, dtype=np.uint64)).tolist() == expected


def test_permutation_is_one_and_depends_on_every_part_of_the_key() -> None:
    orders = [permutation(100, *key).tolist() for key in [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2)]]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert permutation(0, 1).tolist() == []


def test_permutation_is_uniform() -> None:
    """4,000 orders of 6 items: chi-squared with 25 degrees of freedom is below 52.6 (p = 0.999)."""
    counts = np.zeros((6, 6))
    for key in range(4000):
        counts[np.arange(6), permutation(6, key)] += 1
    assert ((counts - 4000 / 6) ** 2 / (4000 / 6)).sum() < 52.6


def test_the_same_in_another_process() -> None:
    code = "from data.lanes.shuffle import *; print(stable_hash(7, 'x'), permutation(9, 7, 'x').tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == f"{stable_hash(7, 'x')} {permutation(9, 7, 'x').tolist()}"
