"""The picture of a plan: memory of a GPU by part, one bar for each layout, beside what a GPU has."""

from pathlib import Path

from launch.estimate import Plan
from trainer.charts import INK, PLAIN, plt

COLOURS = ("#1f4e79", "#2e86c1", "#85c1e9", "#aed6f1", "#d6dbdf", "#ca6f1e", "#e59866", "#f5cba7", "#a9dfbf", "#27ae60", "#7d6608")


def draw(plan: Plan, file: Path, title: str) -> Path:
    """Stacked bars of `plan` at balanced load. Raises ValueError where there is no layout to draw."""
    from launch.plan import PARTS

    forecast = plan.forecast
    if forecast is None or not forecast.candidates:
        raise ValueError(f"--picture {file}: the plan has no layout to draw ({plan.reasons[0]})")
    layouts = forecast.candidates
    names = [f"ZeRO {layout.zero}\nEP {layout.ep}" for layout in layouts]
    with plt.rc_context(PLAIN):
        figure, axis = plt.subplots(figsize=(max(6.0, 1.1 * len(layouts) + 3), 4.2), layout="constrained")
        floor = [0.0] * len(layouts)
        for colour, (part, (name, _)) in zip(COLOURS, PARTS.items(), strict=True):
            heights = [layout.memory.parts.get(part, 0.0) / 1e9 for layout in layouts]
            if any(heights):
                axis.bar(names, heights, bottom=floor, color=colour, label=name, width=0.7)
                floor = [low + height for low, height in zip(floor, heights, strict=True)]
        usable, key = forecast.layout.memory.usable / 1e9, plan.machine.key
        if usable < 3 * max(floor):  # far above them it would press the bars flat
            axis.axhline(usable, color=INK, linestyle="--", linewidth=1, label=f"usable of a {key}")
        axis.set_ylabel("GB of a GPU")
        axis.set_title(f"{title}: memory by part at balanced load; {usable:.1f} GB of a {key} are usable")
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(file)
        plt.close(figure)
    return file
