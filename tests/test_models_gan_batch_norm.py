"""Batch norm over groups: torch's batch norm on each group, whatever the split into
micro-batches."""

import pytest
import torch
from torch import Tensor, nn

from models.gan.batch_norm import ConditionalBatchNorm, GroupedBatchNorm, ScaledBatchNorm, fold_batch_statistics


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 3, 3)])
def test_equals_torch_on_each_group(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * 3 + 1
    ours = ScaledBatchNorm(5, group=4)
    theirs = nn.BatchNorm1d(5) if len(shape) == 2 else nn.BatchNorm2d(5)
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight.copy_(torch.arange(5))
            module.bias.copy_(torch.arange(5) - 2)
    torch.testing.assert_close(ours(x), torch.cat([theirs(group) for group in x.split(4)]))


def _train_step(x: Tensor, weight: Tensor, micro_batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient of a loss through batch norm, and its state, with `x` split into micro-batches."""
    norm = GroupedBatchNorm(5, group=4)
    x = x.clone().requires_grad_()
    for part, w in zip(x.split(micro_batch), weight.split(micro_batch), strict=True):
        (norm(part) * w).sum().backward()
    fold_batch_statistics(norm)
    assert x.grad is not None
    return x.grad, norm.state_dict()


def test_gradients_and_running_statistics_do_not_depend_on_the_split() -> None:
    torch.manual_seed(0)
    x = torch.randn(24, 5, 2, 2) + 2
    weight = torch.randn(24, 5, 2, 2)
    whole_gradient, whole_state = _train_step(x, weight, 24)
    for micro_batch in (4, 8, 12):
        gradient, state = _train_step(x, weight, micro_batch)
        torch.testing.assert_close(gradient, whole_gradient)
        torch.testing.assert_close(state, whole_state)
    groups = x.unflatten(0, (-1, 4)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(whole_state["running_mean"], 0.1 * groups.mean(2).mean(0))
    torch.testing.assert_close(whole_state["running_var"], 0.9 + 0.1 * groups.var(2, correction=0).mean(0))


def test_folding_sums_over_ranks_in_one_call() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 5) + 1
    *ranks, whole = (nn.Sequential(GroupedBatchNorm(5, 4), GroupedBatchNorm(5, 4)) for _ in range(3))
    whole(x)
    fold_batch_statistics(whole)
    for rank, part in zip(ranks, x.split(8), strict=True):
        rank(part)
    total = sum(torch.cat([norm.pending for norm in rank]) for rank in ranks)
    calls: list[Tensor] = []

    def reduce(pending: Tensor) -> Tensor:
        calls.append(pending)
        return total

    for rank in ranks:
        fold_batch_statistics(rank, reduce)
        torch.testing.assert_close(rank.state_dict(), whole.state_dict())
    assert len(calls) == 2


def test_evaluation_uses_running_statistics_and_folding_nothing_changes_nothing() -> None:
    norm = GroupedBatchNorm(5, group=4)
    fold_batch_statistics(norm)
    assert norm.running_var.tolist() == [1.0] * 5
    norm.running_mean.fill_(2.0)
    norm.running_var.fill_(4.0)
    x = torch.randn(3, 5)
    torch.testing.assert_close(norm.eval()(x), (x - 2) / 2, rtol=1e-4, atol=1e-5)


def test_conditional_gain_and_bias_are_linear_in_the_condition() -> None:
    torch.manual_seed(0)
    norm = ConditionalBatchNorm(5, 3, group=4)
    x = torch.randn(8, 5, 2, 2)
    condition = torch.randn(8, 3)
    gain = 1 + condition @ norm.gain.weight.T + norm.gain.bias
    bias = condition @ norm.bias.weight.T + norm.bias.bias
    plain = GroupedBatchNorm(5, 4)(x)
    torch.testing.assert_close(norm(x, condition), plain * gain[..., None, None] + bias[..., None, None])


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="10 samples does not divide into batch-norm groups of 4"):
        GroupedBatchNorm(5, group=4)(torch.randn(10, 5))
