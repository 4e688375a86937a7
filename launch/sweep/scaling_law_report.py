"""A scaling law from a sweep over sizes: which sizes, the fit, the held-out sizes beside their prediction, and the picture."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.console.tables import table
from launch.sweep.config import ScalingLaw
from launch.sweep.outcomes import TrialOutcome
from launch.sweep.scaling_law import CONFIDENCE, Estimate, Law, fit_law
from launch.sweep.trials import Trial
from models.transformer.cost import non_embedding
from trainer.objectives.language.config import LanguageConfig, MaskedLanguageConfig

_FEWEST = 3


@dataclass(frozen=True, kw_only=True)
class Size:
    """A rung of the ladder."""

    name: str
    parameters: int
    """N: without the token embedding and the output matrix, as in Kaplan et al. 2020."""
    losses: list[float]
    """By seed."""

    @property
    def loss(self) -> float:
        """The geometric mean over the seeds, as the fit is in log L."""
        return math.exp(sum(map(math.log, self.losses)) / len(self.losses))


def check_sizes(config: ScalingLaw, trials: Sequence[Trial]) -> None:
    """Raises ValueError if the trials are no ladder of dense language models."""
    sizes = {trial.setting: _parameters(trial) for trial in trials}
    if len(set(sizes.values())) < len(sizes):
        raise ValueError(
            f"fit.scaling_law: the variants have the sizes {', '.join(f'{name} {size:,}' for name, size in sizes.items())}; each needs its own"
        )
    if len(sizes) < _FEWEST + config.hold_out:
        raise ValueError(
            f"fit.scaling_law: {len(sizes)} sizes, of which hold_out keeps {config.hold_out} back; a fit needs {_FEWEST} others, add variants"
        )


def _parameters(trial: Trial) -> int:
    objective = trial.job.run.objective
    if not isinstance(objective, LanguageConfig | MaskedLanguageConfig) or objective.moe is not None:
        raise ValueError(
            f"fit.scaling_law: trial {trial.name} is no dense language model; use moe_lm without run.objective.model.moe"
        )
    return non_embedding(objective.model)


def fit_and_show(
    console: Console, config: ScalingLaw, outcomes: Sequence[TrialOutcome], picture: Path
) -> dict[str, Any] | None:
    """Fit, print and draw; returns the figures, or None where too few sizes have come to their end."""
    groups: dict[str, list[TrialOutcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.trial.setting, []).append(outcome)
    sizes = [
        Size(name=name, parameters=_parameters(group[0].trial), losses=[outcome.value or math.nan for outcome in group])
        for name, group in groups.items()
        if all(
            outcome.status == "finished" and outcome.value is not None and 0 < outcome.value < math.inf
            for outcome in group
        )
    ]
    sizes.sort(key=lambda size: size.parameters)
    held = [size for size in sizes if size.name in _held_out(config, groups)]
    fitted = [size for size in sizes if size not in held]
    if len(fitted) < _FEWEST:
        console.print(
            f"no scaling law: {len(fitted)} of the sizes to fit have come to their end, and it takes {_FEWEST}"
        )
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


def _held_out(config: ScalingLaw, groups: dict[str, list[TrialOutcome]]) -> list[str]:
    by_size = sorted(groups, key=lambda name: _parameters(groups[name][0].trial))
    return by_size[len(by_size) - config.hold_out :]


def _finite(estimate: Estimate) -> dict[str, float | None]:
    """As JSON has it: null for no end."""
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
    title = f"loss by size, {f'geometric means of {seeds} seeds' if seeds > 1 else 'one seed'}; N without embedding and output matrix"
    rows = []
    for size in [*fitted, *held]:
        law_says = predicted[size.name]
        interval = f"{law_says.low:.4f} to {law_says.high:.4f}"
        rows.append(
            (
                size.name,
                f"{size.parameters:,}",
                f"{size.loss:.4f}",
                f"{law_says.value:.4f}",
                interval,
                "held out" if size in held else "fitted",
            )
        )
    headings = ("size", "N", "loss", "law", f"{CONFIDENCE:.0%} for one more", "")
    console.print(table(title, headings, rows, left=(0, -1), cells="cut"))
    console.print(formula(law), style="bold")
    if p is not None:
        decided = "the points ask for it" if law.irreducible else "the points do not ask for it"
        console.print(f"an irreducible loss E: {decided} (F test, p = {p:.3f})")
    for size in held:
        console.print(verdict(size, predicted[size.name]), style="bold")


def formula(law: Law) -> str:
    """The law in words and figures."""
    n_c = (
        f"N_c = {law.n_c.value:.3g} ({law.n_c.low:.3g} to {law.n_c.high:.3g})"
        if math.isfinite(law.n_c.high)
        else f"N_c = {law.n_c.value:.3g} (not decided)"
    )
    floor = (
        f", E = {law.irreducible.value:.3f} ({law.irreducible.low:.3f} to {law.irreducible.high:.3f})"
        if law.irreducible
        else ""
    )
    alpha = f"alpha = {law.alpha.value:.4f} ({law.alpha.low:.4f} to {law.alpha.high:.4f})"
    t = f"{CONFIDENCE:.0%} intervals, Student's t with {law.freedom} degrees of freedom"
    return f"L(N) = {'E + ' if law.irreducible else ''}(N_c / N)^alpha: {alpha}, {n_c}{floor}; {t}"


def verdict(size: Size, law_says: Estimate) -> str:
    """Whether a held-out size came out as predicted."""
    inside = law_says.low <= size.loss <= law_says.high
    off = 100 * (size.loss / law_says.value - 1)
    interval = f"{law_says.low:.4f} to {law_says.high:.4f}"
    return f"held-out {size.name}: predicted {law_says.value:.4f} ({interval}), measured {size.loss:.4f}: {'inside' if inside else 'OUTSIDE'}, {off:+.2f} %"


def draw_law(law: Law, fitted: Sequence[Size], held: Sequence[Size], file: Path) -> None:
    """Loss by size on logarithmic axes: seeds, means, the law, and the interval for one more size."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    from trainer.records.charts import INK, PLAIN, SOFT, plt

    ends = [size.parameters for size in [*fitted, *held]]
    low, high = math.log(0.8 * min(ends)), math.log(1.25 * max(ends))
    grid = [math.exp(low + (high - low) * step / 100) for step in range(101)]
    band = [law.predict(size) for size in grid]
    with plt.rc_context(PLAIN):
        figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
        lows, highs = [each.low for each in band], [each.high for each in band]
        axis.fill_between(
            grid, lows, highs, color="#9ecae1", alpha=0.4, linewidth=0, label=f"{CONFIDENCE:.0%} for one more size"
        )
        axis.plot(grid, [each.value for each in band], color="#08519c", label="the law")
        for sizes, colour, label in ((fitted, INK, "fitted"), (held, "#d64545", "held out")):
            for size in sizes:
                axis.plot([size.parameters] * len(size.losses), size.losses, ".", color=SOFT, markersize=4)
            axis.plot(
                [size.parameters for size in sizes],
                [size.loss for size in sizes],
                "o",
                color=colour,
                markersize=6,
                label=label,
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("N, parameters without embedding and output matrix")
        axis.set_ylabel("held-out loss, nats a token")
        axis.set_title(
            f"alpha = {law.alpha.value:.3f}, {CONFIDENCE:.0%} interval {law.alpha.low:.3f} to {law.alpha.high:.3f}",
            color=INK,
        )
        axis.legend(frameon=False)
        figure.savefig(file)
        plt.close(figure)
