"""Counter-based random numbers: a draw depends on (seed, sample number, purpose), never on rank or
history.

A key is made for each sample from the run's seed, the sample's running number and a purpose.
Numbers are then drawn from the key by SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable
pseudorandom number generators", figure 17). So a micro-batch of 2 x 4 samples draws the same bits
as one of 8, on CPU and on CUDA.

    keys_B = sample_keys(seed, batch["sample"], "diffusion noise")
    noise_BCHW = normal(keys_B, (3, 32, 32))

Legend: B samples, W 64-bit words.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.init import stable_hash

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the odd integer closest to 2^64 / golden ratio, as a signed number
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_LOW_32 = (1 << 32) - 1


def sample_keys(seed: int, samples_B: Tensor, *purpose: str | int) -> Tensor:
    """Return keys (B,) int64 for the samples numbered `samples_B` (int64) of the run with `seed`;
    `purpose` keeps uses apart."""
    return derive(mix(samples_B * _GOLDEN + stable_hash(seed)), *purpose)


def derive(keys_B: Tensor, *purpose: str | int) -> Tensor:
    """Return new keys (B,), independent of `keys_B` and of the keys derived for any other
    purpose."""
    return mix(mix(keys_B) ^ stable_hash(*purpose))


def uniform(keys_B: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Draw float32 numbers (B, *shape), uniform in [0, 1), multiples of 2^-24."""
    words_BW = _words(keys_B, math.prod(shape))
    return (_shift(words_BW, 40).float() * 2.0**-24).view(-1, *shape)


def normal(keys_B: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Draw float32 standard normal numbers (B, *shape) by the Box-Muller transform: two per 64-bit
    word."""
    count = math.prod(shape)
    words_BW = _words(keys_B, (count + 1) // 2)
    # In float64: a CPU's vector and scalar code and GPUs differ in the last bit, which rounding to
    # float32 hides.
    precise = torch.float32 if keys_B.device.type == "mps" else torch.float64
    radius_BW = ((_shift(words_BW, 32) + 1).to(precise) * 2.0**-32).log().mul(-2).sqrt()
    angle_BW = (words_BW & _LOW_32).to(precise) * (2.0**-32 * 2 * math.pi)
    pairs_BW2 = torch.stack((radius_BW * angle_BW.cos(), radius_BW * angle_BW.sin()), dim=-1)
    return pairs_BW2.flatten(1)[:, :count].float().reshape(-1, *shape)


def integers(keys_B: Tensor, high: int, shape: Sequence[int] = ()) -> Tensor:
    """Draw int64 numbers (B, *shape), uniform in [0, high), for high up to 2^31 (bias below high /
    2^32)."""
    assert 0 < high <= 1 << 31, high
    words_BW = _words(keys_B, math.prod(shape))
    return ((_shift(words_BW, 32) * high) >> 32).view(-1, *shape)


def _words(keys_B: Tensor, count: int) -> Tensor:
    """Return `count` 64-bit words per key: SplitMix64's output after 1, 2, ... steps from the state
    `key`."""
    steps_W = torch.arange(1, count + 1, device=keys_B.device) * _GOLDEN
    return mix(keys_B[:, None] + steps_W)


def mix(z: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser: a bijection of 64-bit words in which each input bit flips about
    half of the output's."""
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, by: int) -> Tensor:
    """Shift int64 words right logically (torch's own shift keeps the sign)."""
    return (z >> by) & ((1 << (64 - by)) - 1)
