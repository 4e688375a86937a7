"""Contrastive losses against NumPy on whole matrices, their gradients against its finite
differences, and how much memory they take."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import logsumexp
from torch.utils._python_dispatch import TorchDispatchMode

from models.contrastive.losses import Embedded, clamped, leads_out, nt_xent, sigmoid_pairs, symmetric_info_nce

Array = npt.NDArray[np.float64]
N = 7
P = 4
LOSSES: dict[str, Callable[..., Any]] = {
    "nt_xent": nt_xent,
    "symmetric_info_nce": symmetric_info_nce,
    "sigmoid_pairs": sigmoid_pairs,
}


def in_numpy(name: str, a: Array, b: Array, log_scale: Array, bias: Array) -> float:
    """The summed loss as the papers write it."""
    scale = math.exp(log_scale[0])
    if name == "nt_xent":
        z = np.concatenate([a, b])
        logits = scale * z @ z.T
        np.fill_diagonal(logits, -np.inf)
        partner = np.concatenate([np.arange(N, 2 * N), np.arange(N)])
        return float((logsumexp(logits, axis=1) - logits[np.arange(2 * N), partner]).sum() / 2)
    logits = scale * a @ b.T
    if name == "symmetric_info_nce":
        return float((logsumexp(logits, axis=1) + logsumexp(logits, axis=0) - 2 * np.diag(logits)).sum() / 2)
    y = 2 * np.eye(N) - 1
    return float(np.log1p(np.exp(-y * (logits + bias[0]))).sum())


def inputs() -> dict[str, Array]:
    draw = np.random.default_rng(0)
    a, b = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in draw.normal(size=(2, N, P)))
    return {"a": a, "b": b, "log_scale": np.array([1.3]), "bias": np.array([-0.7])}


def slopes(name: str) -> dict[str, Array]:
    """Central differences of `in_numpy` by every input."""
    found = {}
    step = 1e-6
    for key, values in inputs().items():
        found[key] = np.zeros_like(values)
        for place in np.ndindex(values.shape):
            ends = []
            for sign in (1, -1):
                moved = inputs()
                moved[key][place] += sign * step
                ends.append(in_numpy(name, **moved))
            found[key][place] = (ends[0] - ends[1]) / (2 * step)
    return found


def embedded(dtype: torch.dtype = torch.float64) -> Embedded:
    return Embedded(*(torch.from_numpy(values).to(dtype) for values in inputs().values()))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_loss_and_gradients_are_those_of_numpy(name: str, chunk: int) -> None:
    numbers = torch.tensor([40, 3, 8, 0, 77, 5, 12])
    expected = slopes(name)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        z = embedded(dtype)
        found = LOSSES[name](z, numbers, z.log_scale.exp(), chunk, lambda rows: rows)
        assert found.loss_M.dtype == dtype
        assert found.loss_M.sum().item() == pytest.approx(in_numpy(name, **inputs()), rel=tolerance)
        for key, value in (("a", found.a_MP), ("b", found.b_MP), ("log_scale", found.log_scale_M.sum(0, keepdim=True))):
            np.testing.assert_allclose(value.numpy(), expected[key], atol=10 * tolerance, err_msg=key)
        if name == "sigmoid_pairs":
            np.testing.assert_allclose(found.bias_M.sum().item(), expected["bias"], atol=10 * tolerance)


def test_a_worked_example_of_the_sigmoid_loss() -> None:
    """Two orthogonal pairs at scale 1 and bias 0: two positive logits of 1, two negative ones of
    0."""
    z = Embedded(torch.eye(2), torch.eye(2), torch.zeros(1), torch.zeros(1))
    found = sigmoid_pairs(z, torch.arange(2), torch.ones(1), 1, lambda rows: rows)
    torch.testing.assert_close(found.loss_M, torch.full((2,), math.log(1 + math.exp(-1)) + math.log(2)))


class Largest(TorchDispatchMode):
    """The most elements that any result has."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            self.elements = max(self.elements, each.numel() if isinstance(each, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("name", LOSSES)
def test_memory_grows_with_own_rows_times_chunk(name: str) -> None:
    """This process has 8 of 1024 pairs: its largest tensors are the gathered embeddings and one
    block of logits."""
    everyone = torch.nn.functional.normalize(torch.randn(2048, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    z = Embedded(everyone[:8], everyone[8:16], torch.zeros(1), torch.zeros(1))

    def gather(rows: torch.Tensor) -> torch.Tensor:
        total = 2048 if len(rows) == 16 else 1024
        return everyone[:total] if rows.ndim == 2 else torch.zeros(total, dtype=rows.dtype)

    for chunk in (64, 1024):
        with Largest() as largest:
            LOSSES[name](z, torch.arange(8), torch.ones(1), chunk, gather)
        assert largest.elements <= max(4 * 2048, 16 * chunk)


def test_the_temperature_is_clamped_and_finds_its_way_back() -> None:
    log_scale = torch.tensor([-1.0, 0.0, 2.0, math.log(100), 7.0])
    torch.testing.assert_close(clamped(log_scale, 0.01), torch.tensor([1.0, 1.0, math.exp(2), 100.0, 100.0]))
    # Descent goes against the gradient: upwards where it is negative.
    assert leads_out(log_scale, torch.tensor(-1.0), 0.01).tolist() == [False, False, False, True, True]
    assert leads_out(log_scale, torch.tensor(1.0), 0.01).tolist() == [True, True, False, False, False]
