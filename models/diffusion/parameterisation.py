"""Parameterisations of a diffusion network (noise, x0 or v), and the predictions that samplers read
from its output.

M samples of any shape. A network that learns the variance returns twice the channels; the second
half is for the variance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.diffusion.schedules import NoiseSchedule

Target = Literal["noise", "x0", "v"]


@dataclass(frozen=True)
class Prediction:
    """A denoiser's estimates at x_t; x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise always
    holds."""

    x0: Tensor
    """Estimate of the clean sample."""
    noise: Tensor
    """Estimate of the noise."""
    variance_fraction: Tensor | None = None
    """Position of the learned log variance between log beta tilde (0) and log beta (1) (Nichol &
    Dhariwal 2021, eq. 15)."""


Denoiser = Callable[[Tensor, Tensor], Prediction]
"""Maps (x_t, t_M) to a Prediction: a network or a closed form, with labels and guidance already
applied."""


def target(kind: Target, schedule: NoiseSchedule, x0: Tensor, t_M: Tensor, noise: Tensor) -> Tensor:
    """Return the network's target: the noise, x0, or v = sqrt(alpha_bar) noise - sqrt(1 -
    alpha_bar) x0 (Salimans & Ho 2022, appendix D)."""
    match kind:
        case "noise":
            return noise
        case "x0":
            return x0
        case "v":
            signal, spread = schedule.scales(t_M, x0)
            return signal * noise - spread * x0


def split_variance(output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split a network's output into the mean's part and the variance fraction, which is None unless
    the output has twice the channels of `x_t`."""
    if output.shape[1] == x_t.shape[1]:
        return output, None
    assert output.shape[1] == 2 * x_t.shape[1], f"{output.shape[1]} output channels for samples of {x_t.shape[1]}"
    mean, variance = output.chunk(2, dim=1)
    return mean, (variance + 1) / 2


def predict(kind: Target, schedule: NoiseSchedule, output: Tensor, x_t: Tensor, t: Tensor | int) -> Prediction:
    """Compute x0 and noise from the network's `output` at `x_t`."""
    output, fraction = split_variance(output, x_t)
    signal, spread = schedule.scales(t, x_t)
    match kind:
        case "noise":
            return Prediction((x_t - spread * output) / signal, output, fraction)
        case "x0":
            return Prediction(output, (x_t - signal * output) / spread, fraction)
        case "v":
            return Prediction(signal * x_t - spread * output, spread * x_t + signal * output, fraction)


def denoiser(network: Callable[[Tensor, Tensor], Tensor], kind: Target, schedule: NoiseSchedule) -> Denoiser:
    """Wrap `network`, (x_t, t_M) -> output, as a denoiser."""
    return lambda x_t, t_M: predict(kind, schedule, network(x_t, t_M), x_t, t_M)


def clipped(inner: Denoiser, schedule: NoiseSchedule, bound: float = 1.0) -> Denoiser:
    """Wrap `inner` so that x0 is clamped to [-bound, bound], the range of images, with the noise to
    match."""

    def denoise(x_t: Tensor, t_M: Tensor) -> Prediction:
        prediction = inner(x_t, t_M)
        x0 = prediction.x0.clamp(-bound, bound)
        signal, spread = schedule.scales(t_M, x_t)
        return Prediction(x0, (x_t - signal * x0) / spread, prediction.variance_fraction)

    return denoise


def guided(
    network: Callable[[Tensor, Tensor, Tensor], Prediction], labels_M: Tensor, null_label: int, scale: float
) -> Denoiser:
    """Apply classifier-free guidance (Ho & Salimans 2022, eq. 6): noise = unconditional + scale *
    (conditional - unconditional). Scale 1 is plain conditioning.

    `network` maps (x_t, t, labels) to a Prediction and receives both halves as one batch of 2 M. x0
    is linear in the noise, so it is guided alike.
    """
    labels = torch.cat([labels_M, torch.full_like(labels_M, null_label)])

    def denoise(x_t: Tensor, t_M: Tensor) -> Prediction:
        both = network(torch.cat([x_t, x_t]), torch.cat([t_M, t_M]), labels)
        x0, x0_null = both.x0.chunk(2)
        noise, noise_null = both.noise.chunk(2)
        fraction = None if both.variance_fraction is None else both.variance_fraction.chunk(2)[0]
        return Prediction(x0_null + scale * (x0 - x0_null), noise_null + scale * (noise - noise_null), fraction)

    return denoise
