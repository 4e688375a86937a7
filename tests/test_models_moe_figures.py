"""The figures of routing health against their definitions, on a load made by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from models.moe.figures import routing_figures, routing_sums
from models.moe.layer import RouteStats
from trainer.core.training import add
from trainer.records.charts import expert_load


def stats(load: list[float], dropped: float, entropy: float, gate: float, busiest: float) -> RouteStats:
    total = sum(load)
    sums = (torch.tensor(value) for value in (load, dropped, entropy, gate, total, busiest, total - dropped))
    return RouteStats(torch.tensor([1.5, 2.5]), torch.tensor([4.0, 6.0]), *sums)


def test_health_of_two_micro_batches() -> None:
    sums = {"targets": torch.tensor(40.0)}
    for layer in (
        stats([10.0, 6.0, 4.0, 0.0], 4.0, 20.0, 8.0, 8.0),
        stats([2.0, 12.0, 6.0, 0.0], 0.0, 16.0, 12.0, 12.0),
    ):
        add(sums, routing_sums([layer, layer], torch.tensor([15.0, 5.0])))
    figures = routing_figures(sums)
    load = np.array([12.0, 18.0, 10.0, 0.0])
    expected = {
        "load_cv": load.std() / load.mean(),
        "load_max_over_mean": 1.8,
        "dead_experts": 1,
        "imbalance_tax": (8 + 12) / (16 / 4 + 20 / 4),
        "router_entropy": 36 / 40,
        "drop_rate": 4 / 40,
        "gate_mean": 20 / 40,
        "balance_loss": (1.5 * 15 + 2.5 * 5) / 20,
        "z_loss": (4 * 15 + 6 * 5) / 20,
    }
    for layer in (0, 1):
        for name, value in expected.items():
            assert figures[f"{name}/layer{layer}"] == pytest.approx(value, rel=1e-6), name
        shares = [figures[f"expert_load/layer{layer}/expert{expert}"] for expert in range(4)]
        assert shares == pytest.approx(list(load / 40))
    assert len(figures) == 2 * (len(expected) + 4)
    assert all(math.isfinite(value) for value in figures.values())


def test_the_picture_shows_the_load_by_layer_expert_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    imshow = Axes.imshow
    monkeypatch.setattr(
        "matplotlib.axes.Axes.imshow",
        lambda axis, shares, **options: drawn.append(shares) or imshow(axis, shares, **options),
    )
    rows = [
        (10 * i, {f"expert_load/layer{n}/expert{e}": (i + n + e) / 10 for n in (0, 1) for e in (0, 1, 2)})
        for i in (1, 2)
    ]
    file = expert_load([*rows, (20, {"collapse/layer1": 0.95})], [0, 1], tmp_path / "load.png", "test")
    assert file.read_bytes().startswith(b"\x89PNG")
    for layer, shares in enumerate(drawn):
        np.testing.assert_allclose(shares, [[3 * (i + layer + expert) / 10 for i in (1, 2)] for expert in (0, 1, 2)])
    assert len(drawn) == 2
