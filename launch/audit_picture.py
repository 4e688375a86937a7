"""The picture of an audit: the error signal on its way from the loss to the input, and each layer's gradient."""

from pathlib import Path

from launch.audit_report import unusual_signals
from trainer.audit.verdict import Findings, Subject
from trainer.charts import INK, PLAIN, SOFT, plt


def draw(findings: Findings, file: Path, title: str) -> Path:
    """A panel for each network: |dL / d output| and |dL / d weights| of its layers, in the order of the forward pass."""
    marked = {line.partition(":")[0] for line in unusual_signals(findings)}
    with plt.rc_context(PLAIN):
        panels = len(findings.signals)
        figure, axes = plt.subplots(panels, 1, figsize=(10, 1 + 3.4 * panels), squeeze=False, layout="constrained")
        figure.suptitle(f"{title}: the error signal, layer by layer", color=INK)
        for axis, (phase, signals) in zip(axes[:, 0], findings.signals.items(), strict=True):
            layers = [layer for layer, signal in signals.items() if signal.size and signal.squares]
            axis.semilogy([signals[layer].norm for layer in layers], color="#1f4e79", marker="o", markersize=3, label="|dL / d output|")
            axis.semilogy([_gradient(findings, f"{phase}/{layer}") for layer in layers], color="#ca6f1e", marker="s", markersize=3, label="|dL / d weights|")
            for place, layer in enumerate(layers):
                if f"{phase}/{layer}" in marked:
                    axis.axvline(place, color="#d64545", linestyle=":")
            axis.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
            axis.set_title(f"{phase}, from input to loss; dotted: vanishes or explodes")
            axis.grid(axis="y", color=SOFT, alpha=0.3)
            axis.legend(frameon=False)
        figure.savefig(file)
        plt.close(figure)
    return file


def _gradient(findings: Findings, layer: str) -> float:
    """Norm of all gradients of one layer in the last step."""
    mine = [each for each in findings.judged if each.what is Subject.GRADIENT and each.name.partition("[")[0].rpartition(".")[0] == layer]
    last = max((each.step for each in mine), default=0)
    return sum(each.size**2 for each in mine if each.step == last) ** 0.5 or float("nan")
