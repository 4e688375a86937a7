"""Counter-based random numbers against SplitMix64's published output and the distributions' closed
forms."""

import torch
from scipy import stats

from models.random import _words, derive, integers, normal, sample_keys, uniform


def test_words_are_splitmix64() -> None:
    # The first outputs of Vigna's reference splitmix64.c (public domain) from the state 1234567.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    words = _words(torch.tensor([1234567]), 5)[0].tolist()
    assert [word % (1 << 64) for word in words] == expected


def test_splitting_the_samples_changes_no_bit() -> None:
    samples = torch.arange(100, 107)
    for draw in (uniform, normal, lambda keys, shape: integers(keys, 1000, shape)):
        whole = draw(sample_keys(3, samples, "noise", 1), (3, 5))
        parts = [draw(sample_keys(3, part, "noise", 1), (3, 5)) for part in samples.split((1, 4, 2))]
        assert torch.equal(whole, torch.cat(parts))


def test_keys_differ_by_seed_sample_and_purpose() -> None:
    samples = torch.arange(1000)
    keys = [
        sample_keys(0, samples, "a"),
        sample_keys(1, samples, "a"),
        sample_keys(0, samples, "b"),
        derive(sample_keys(0, samples, "a"), "a"),
    ]
    assert len(torch.cat(keys).unique()) == 4000


def test_distributions() -> None:
    keys = sample_keys(0, torch.arange(64), "test")
    u = uniform(keys, (500,))
    z = normal(keys, (501,))
    n = integers(keys, 7, (500,))
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.flatten(), "uniform").pvalue > 1e-3
    assert stats.kstest(z.flatten(), "norm").pvalue > 1e-3
    assert stats.chisquare(n.flatten().bincount(minlength=7)).pvalue > 1e-3
    for draws in (u, z):  # neighbours in a sample, and the same place in neighbouring samples, are uncorrelated
        assert abs(stats.pearsonr(draws[:, 1:].flatten(), draws[:, :-1].flatten()).statistic) < 0.03
        assert abs(stats.pearsonr(draws[1:].flatten(), draws[:-1].flatten()).statistic) < 0.03


def test_shapes() -> None:
    keys = sample_keys(0, torch.arange(4), "test")
    assert uniform(keys).shape == (4,)
    assert normal(keys, (3, 1)).shape == (4, 3, 1)
    assert integers(keys, 5, (2,)).dtype == torch.int64
