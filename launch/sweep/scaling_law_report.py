"""The report of a scaling law: its sizes, the fit, the predictions of held-out sizes, a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from launch.console.tables import table
from launch.sweep.config import ScalingLaw
from launch.sweep.outcomes import TrialOutcome
from launch.sweep.scaling_law import CONFIDENCE, Estimate, Law, fit_law
from launch.sweep.trials import Trial
from models.transformer.cost import non_embedding
from trainer.objectives.language.config import LanguageConfig, MaskedLanguageConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAST_SIZES = 3


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model size of the sweep, with the losses measured at it."""

    name: str
    parameters: int
    """N, the parameters without token embedding and output matrix, as in Kaplan et al. 2020."""
    losses: list[float]
    """The final loss per seed."""

    @property
    def loss(self) -> float:
        """The geometric mean over the seeds, because the fit is in log L."""
        return math.exp(sum(map(math.log, self.losses)) / len(self.losses))


def check_sizes(config: ScalingLaw, trials: Sequence[Trial]) -> None:
    """Raises ValueError unless the trials are dense language models of enough different sizes."""
    sizes = {trial.setting: _parameters(trial) for trial in trials}
    if len(set(sizes.values())) < len(sizes):
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise ValueError(f"fit.scaling_law: the variants have the sizes {listed}; give each a size of its own")
    if len(sizes) < _LEAST_SIZES + config.hold_out:
        given = f"{len(sizes)} sizes, of which hold_out keeps {config.hold_out} back"
        raise ValueError(f"fit.scaling_law: {given}; add variants until {_LEAST_SIZES} others are left to fit")


def _parameters(trial: Trial) -> int:
    objective = trial.job.run.objective
    if not isinstance(objective, LanguageConfig | MaskedLanguageConfig) or objective.moe is not None:
        problem = f"trial {trial.name} is not a dense language model"
        raise ValueError(f"fit.scaling_law: {problem}; use moe_lm without run.objective.model.moe")
    return non_embedding(objective.model)


def fit_and_show(
    console: Console, config: ScalingLaw, outcomes: Sequence[TrialOutcome], picture: Path
) -> dict[str, object] | None:
    """Fit the law, print it and draw it to `picture`.

    Returns the entry `fit` of results.json, or None if too few sizes have finished.
    """
    groups: dict[str, list[TrialOutcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.trial.setting, []).append(outcome)
    sizes = _finished_sizes(groups)
    held_out_names = _held_out(config, groups)
    held = [size for size in sizes if size.name in held_out_names]
    fitted = [size for size in sizes if size not in held]
    if len(fitted) < _LEAST_SIZES:
        console.print(f"no scaling law: {len(fitted)} of the sizes to fit have finished, and it takes {_LEAST_SIZES}")
        return None
    law, p = fit_law([size.parameters for size in fitted], [size.loss for size in fitted])
    predicted = {size.name: law.predict(size.parameters) for size in sizes}
    _print(console, law, p, fitted, held, predicted)
    draw_law(law, fitted, held, picture)
    return {
        "alpha": asdict(law.alpha),
        "n_c": _finite(law.n_c),
        "irreducible": law.irreducible and asdict(law.irreducible),
        "irreducible_p": p,
        "confidence": CONFIDENCE,
        "sizes": [
            asdict(size) | {"held_out": size in held, "loss": size.loss, "law": asdict(predicted[size.name])}
            for size in sizes
        ],
    }


def _finished_sizes(groups: Mapping[str, Sequence[TrialOutcome]]) -> list[Size]:
    """The sizes all of whose trials have finished with a usable loss, the smallest first."""
    sizes = []
    for name, group in groups.items():
        values = [outcome.value for outcome in group if outcome.status == "finished"]
        losses = [value for value in values if value is not None and 0 < value < math.inf]
        if len(losses) == len(group):
            sizes.append(Size(name=name, parameters=_parameters(group[0].trial), losses=losses))
    return sorted(sizes, key=lambda size: size.parameters)


def _held_out(config: ScalingLaw, groups: Mapping[str, Sequence[TrialOutcome]]) -> list[str]:
    """The names of the largest sizes, which the fit leaves out."""
    by_size = sorted(groups, key=lambda name: _parameters(groups[name][0].trial))
    return by_size[len(by_size) - config.hold_out :]


def _finite(estimate: Estimate) -> dict[str, float | None]:
    """The estimate for JSON, with null for an infinite end of the interval."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(estimate).items()}


def _print(
    console: Console,
    law: Law,
    p: float | None,
    fitted: Sequence[Size],
    held: Sequence[Size],
    predicted: dict[str, Estimate],
) -> None:
    seeds = len(fitted[0].losses)
    averaged = f"geometric means of {seeds} seeds" if seeds > 1 else "one seed"
    title = f"loss by size, {averaged}; N without embedding and output matrix"
    rows = []
    for size in [*fitted, *held]:
        prediction = predicted[size.name]
        interval = f"{prediction.low:.4f} to {prediction.high:.4f}"
        figures = (f"{size.parameters:,}", f"{size.loss:.4f}", f"{prediction.value:.4f}", interval)
        rows.append((size.name, *figures, "held out" if size in held else "fitted"))
    headings = ("size", "N", "loss", "law", f"{CONFIDENCE:.0%} for one more", "")
    console.print(table(title, headings, rows, left=(0, -1), cells="cut"))
    console.print(formula(law), style="bold")
    if p is not None:
        decided = "the points call for it" if law.irreducible else "the points do not call for it"
        console.print(f"an irreducible loss E: {decided} (F test, p = {p:.3f})")
    for size in held:
        console.print(verdict(size, predicted[size.name]), style="bold")


def formula(law: Law) -> str:
    """The law as a formula, and its parameters with their intervals."""
    alpha = f"alpha = {law.alpha.value:.4f} ({law.alpha.low:.4f} to {law.alpha.high:.4f})"
    n_c_interval = "not decided"
    if math.isfinite(law.n_c.high):
        n_c_interval = f"{law.n_c.low:.3g} to {law.n_c.high:.3g}"
    n_c = f"N_c = {law.n_c.value:.3g} ({n_c_interval})"
    t = f"{CONFIDENCE:.0%} intervals, Student's t with {law.freedom} degrees of freedom"
    if law.irreducible is None:
        return f"L(N) = (N_c / N)^alpha: {alpha}, {n_c}; {t}"
    floor = law.irreducible
    e = f"E = {floor.value:.3f} ({floor.low:.3f} to {floor.high:.3f})"
    return f"L(N) = E + (N_c / N)^alpha: {alpha}, {n_c}, {e}; {t}"


def verdict(size: Size, prediction: Estimate) -> str:
    """Says whether the loss of a held-out size is inside the predicted interval."""
    inside = "inside" if prediction.low <= size.loss <= prediction.high else "OUTSIDE"
    error = 100 * (size.loss / prediction.value - 1)
    interval = f"{prediction.low:.4f} to {prediction.high:.4f}"
    predicted = f"predicted {prediction.value:.4f} ({interval})"
    return f"held-out {size.name}: {predicted}, measured {size.loss:.4f}: {inside}, {error:+.2f} %"


def draw_law(law: Law, fitted: Sequence[Size], held: Sequence[Size], file: Path) -> None:
    """Draw the seeds, their means, the law, and the interval for one more size, all on log axes."""
    from trainer.records.charts import INK, PLAIN, plt

    with plt.rc_context(PLAIN):
        figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
        _draw_curve(axis, law, [size.parameters for size in [*fitted, *held]])
        _draw_sizes(axis, fitted, INK, "fitted")
        _draw_sizes(axis, held, "#d64545", "held out")
        _set_axes(axis)
        interval = f"{law.alpha.low:.3f} to {law.alpha.high:.3f}"
        axis.set_title(f"alpha = {law.alpha.value:.3f}, {CONFIDENCE:.0%} interval {interval}", color=INK)
        axis.legend(frameon=False)
        figure.savefig(file)
        plt.close(figure)


def _draw_curve(axis: "Axes", law: Law, parameters: Sequence[int]) -> None:
    """Draw the law and its interval, a little beyond the smallest and the largest size."""
    low = math.log(0.8 * min(parameters))
    high = math.log(1.25 * max(parameters))
    grid = [math.exp(low + (high - low) * step / 100) for step in range(101)]
    band = [law.predict(size) for size in grid]
    label = f"{CONFIDENCE:.0%} for one more size"
    lows = [estimate.low for estimate in band]
    highs = [estimate.high for estimate in band]
    axis.fill_between(grid, lows, highs, color="#9ecae1", alpha=0.4, linewidth=0, label=label)
    axis.plot(grid, [estimate.value for estimate in band], color="#08519c", label="the law")


def _draw_sizes(axis: "Axes", sizes: Sequence[Size], colour: str, label: str) -> None:
    """Draw a small point per seed, and a large one at the mean of each size."""
    from trainer.records.charts import SOFT

    for size in sizes:
        axis.plot([size.parameters] * len(size.losses), size.losses, ".", color=SOFT, markersize=4)
    means = [size.loss for size in sizes]
    axis.plot([size.parameters for size in sizes], means, "o", color=colour, markersize=6, label=label)


def _set_axes(axis: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("N, parameters without embedding and output matrix")
    axis.set_ylabel("held-out loss, nats per token")
