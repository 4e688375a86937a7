"""The scaling law against closed forms and SciPy's regression.

Over many draws from a known law, its intervals hold the truth as often as they should.
"""

import math

import numpy as np
import pytest
from scipy.stats import linregress
from scipy.stats import t as student

from launch.sweep.scaling_law import Estimate, fit_law, fit_power_law, fit_with_floor
from launch.sweep.scaling_law_report import Size, formula, verdict
from models.transformer.cost import non_embedding
from models.transformer.model import Transformer, TransformerConfig

SIZES = [6e3, 14e3, 25e3, 57e3, 114e3]
HELD_OUT = 250e3
ALPHA = 0.076
N_C = 8.8e13
NOISE = 0.01


def law(size: float, floor: float = 0.0, alpha: float = ALPHA, n_c: float = N_C) -> float:
    return floor + math.exp(alpha * math.log(n_c / size))


def drawn(generator: np.random.Generator, sizes: list[float], floor: float = 0.0) -> list[float]:
    return [law(size, floor) * math.exp(NOISE * generator.standard_normal()) for size in sizes]


def holds(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


def test_points_on_a_law_give_the_law() -> None:
    found = fit_power_law(SIZES, [law(size) for size in SIZES])
    assert found.alpha.value == pytest.approx(ALPHA, rel=1e-9)
    assert found.n_c.value == pytest.approx(N_C, rel=1e-6)
    assert found.predict(HELD_OUT).value == pytest.approx(law(HELD_OUT), rel=1e-9)
    assert found.predict(HELD_OUT).high == pytest.approx(law(HELD_OUT), rel=1e-6)


def test_alpha_and_prediction_are_those_of_the_regression() -> None:
    losses = drawn(np.random.default_rng(1), SIZES)
    found = fit_power_law(SIZES, losses)
    x = np.log(SIZES)
    y = np.log(losses)
    line = linregress(x, y)
    quantile = student.ppf(0.975, len(SIZES) - 2)
    assert found.alpha.value == pytest.approx(-line.slope)
    assert found.alpha.high - found.alpha.value == pytest.approx(quantile * line.stderr)
    assert found.n_c.value == pytest.approx(math.exp(-line.intercept / line.slope))
    spread = np.sum((x - x.mean()) ** 2)
    scatter = math.sqrt(np.sum((y - line.intercept - line.slope * x) ** 2) / (len(SIZES) - 2))
    reach = quantile * scatter * math.sqrt(1 + 1 / len(SIZES) + (math.log(HELD_OUT) - x.mean()) ** 2 / spread)
    predicted = found.predict(HELD_OUT)
    assert math.log(predicted.high / predicted.value) == pytest.approx(reach)
    assert math.log(predicted.value / predicted.low) == pytest.approx(reach)


def test_n_c_has_an_end_only_where_the_loss_surely_falls() -> None:
    flat = fit_power_law([1e3, 1e4, 1e5, 1e6], [2.0, 2.2, 1.9, 2.1])
    assert flat.alpha.low < 0 < flat.alpha.high
    assert (flat.n_c.low, flat.n_c.high) == (0.0, math.inf)
    assert "not decided" in formula(flat)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    draws = 1000
    hits = np.zeros(3)
    for _ in range(draws):
        found = fit_power_law(SIZES, drawn(generator, SIZES))
        (new,) = drawn(generator, [HELD_OUT])
        hits += [holds(found.alpha, ALPHA), holds(found.n_c, N_C), holds(found.predict(HELD_OUT), new)]
    assert np.all(np.abs(hits / draws - 0.95) < 3 * math.sqrt(0.95 * 0.05 / draws)), hits


def test_an_irreducible_loss_is_found_where_there_is_one() -> None:
    sizes = [1e3 * 3**power for power in range(8)]
    found = fit_with_floor(sizes, [law(size, 1.5, 0.4, 1e4) for size in sizes])
    assert found.irreducible is not None
    assert found.irreducible.value == pytest.approx(1.5, rel=1e-4)
    assert (found.alpha.value, found.n_c.value) == (pytest.approx(0.4, rel=1e-3), pytest.approx(1e4, rel=1e-2))
    chosen, p = fit_law(
        sizes, [law(size, 1.5, 0.4, 1e4) * math.exp(NOISE * (-1) ** index) for index, size in enumerate(sizes)]
    )
    assert chosen.irreducible is not None
    assert p is not None
    assert p < 0.001
    assert holds(chosen.irreducible, 1.5)
    assert holds(chosen.predict(1e7), law(1e7, 1.5, 0.4, 1e4))


def test_an_irreducible_loss_is_not_found_where_there_is_none() -> None:
    generator = np.random.default_rng(2)
    draws = 60
    sizes = [*SIZES, HELD_OUT, 500e3]
    wrong = sum(fit_law(sizes, drawn(generator, sizes))[0].irreducible is not None for _ in range(draws))
    assert wrong <= 0.05 * draws + 3 * math.sqrt(0.05 * 0.95 * draws)
    assert fit_law(SIZES[:4], [law(size) for size in SIZES[:4]])[1] is None


def test_the_verdict_follows_from_the_interval() -> None:
    predicted = Estimate(2.0, 1.9, 2.1)
    assert "inside" in verdict(Size(name="big", parameters=250_000, losses=[2.0, 2.1]), predicted)
    assert "OUTSIDE, +10.00 %" in verdict(Size(name="big", parameters=250_000, losses=[2.2]), predicted)


def test_n_counts_neither_embedding_nor_output_matrix() -> None:
    config = TransformerConfig(layers=3, d_model=24, heads=4, kv_heads=2, ffn=40, qk_norm=True)
    network = Transformer(config, vocab_size=257)
    left = sum(each.numel() for name, each in network.named_parameters() if not name.startswith(("embedding", "head")))
    assert non_embedding(config) == left
