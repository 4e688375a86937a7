"""`switchwork prove thought`: is it worth writing the steps of a calculation down?

Two models differ only in their training texts, which have the same number of tokens: problems with
their answers, and problems with the steps to the answers. The proof reports the accuracy of both
by number of steps, with intervals.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.console import Console
from rich.table import Table

from data.sources.kinds import Files
from launch.commands.task_eval import answer_task
from launch.config import JobConfig
from launch.prove.arithmetic import write_task, write_texts
from launch.prove.side_by_side import named, summaries
from trainer.checkout import CHECKOUT
from trainer.config import RunConfig
from trainer.inference.few_shot import Answer, Style, wilson
from trainer.objectives.language.config import LanguageConfig
from trainer.parsing import Json, parse, plain, read_job
from trainer.run_files import run_files
from trainer.storage import absolute, check_writable

if TYPE_CHECKING:  # matplotlib takes a second to import, and only the picture needs it
    from matplotlib.axes import Axes

RECIPE = str(CHECKOUT / "launch" / "configs" / "prove_thought.yaml")
_STYLES: tuple[Style, ...] = get_args(Style)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the command."""

    max_steps: int
    """The largest number of steps of a problem; the smallest is one."""
    problems: int
    """Problems per number of steps."""
    shots: int
    """Worked examples before each problem."""
    processes: int
    """Runs at the same time."""
    folder: str
    """Folder of the texts, the runs, the results and the picture."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_steps <= 12 or self.problems < 20:
            raise ValueError(
                f"--steps {self.max_steps} and --problems {self.problems}: "
                "use 1 to 12 steps, and at least 20 problems per number of steps"
            )


@dataclass(frozen=True, kw_only=True)
class Level:
    """The accuracy of both styles on problems with one number of steps."""

    steps: int
    of: int
    """Number of problems."""
    right: dict[Style, int]
    """Number of right answers, by style."""
    lead: float
    """Share of right answers with the steps written out minus that without, item by item."""
    low: float
    """Lower end of the lead's 95 % interval."""
    high: float
    """Upper end of the lead's 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """The content of `results.json`."""

    job: Json
    """The run from which the runs of both styles are derived."""
    tokens: int
    """Number of training tokens per style."""
    shots: int
    minutes_of_runs: dict[Style, float]
    levels: list[Level]


def prove(console: Console, path: str, overrides: Sequence[str], options: Options) -> None:
    """Make the texts, train the missing runs, answer the problems, and report the accuracies."""
    run = parse(JobConfig, read_job(path, overrides)).run
    if not isinstance(run.objective, LanguageConfig) or run.stop.steps is None:
        raise ValueError(
            f"{path}: the proof trains a language model for a number of steps; "
            "use the objective moe_lm, and set run.stop.steps"
        )
    root = Path(absolute(options.folder))
    check_writable(str(root), "--folder")
    task = root / "task.jsonl"
    steps = range(1, options.max_steps + 1)
    asked = write_task(task, steps, options.problems, seed=run.seed + 1)
    runs = {style: _run(run, run.objective, style, root, steps, asked) for style in _STYLES}
    trained = summaries(console, list(runs.values()), options.processes, "training")
    answers = {
        style: answer_task(console, run_files(own.root, own.name).folder, task, options.shots, style)
        for style, own in runs.items()
    }
    results = Results(
        job=plain(run),
        tokens=run.stop.steps * run.batch.global_batch * run.objective.data.seq_len,
        shots=options.shots,
        minutes_of_runs={style: summary["train_seconds"] / 60 for style, summary in zip(runs, trained, strict=True)},
        levels=[_level(count, answers) for count in steps],
    )
    (root / "results.json").write_text(json.dumps(asdict(results), indent=1))
    _show(console, results, options.folder)
    draw_accuracy(results.levels, root / "proof.png")


def _run(
    run: RunConfig, objective: LanguageConfig, style: Style, root: Path, steps: Sequence[int], asked: set[str]
) -> RunConfig:
    """Write the texts of `style`, and return the run that trains on them.

    The texts have more characters than the run reads.
    """
    texts = root / "texts" / f"{style}-{len(steps)}"
    characters = round(1.3 * (run.stop.steps or 0) * run.batch.global_batch * objective.data.seq_len)
    write_texts(texts, style, steps, characters, run.seed, asked)
    data = replace(objective.data, source=Files(paths=(f"{texts}/*.jsonl",)))
    return named(replace(run, objective=replace(objective, data=data)), style, str(root / "runs"))


def _level(steps: int, answers: Mapping[Style, Sequence[Answer]]) -> Level:
    """Compare the answers of both styles to the problems that take `steps` steps."""
    direct = _right(answers["direct"], steps)
    thought = _right(answers["chain_of_thought"], steps)
    differences = [thought[item] - direct[item] for item in direct]
    count = len(differences)
    lead = sum(differences) / count
    reach = 1.959964 * math.sqrt(sum((difference - lead) ** 2 for difference in differences) / (count - 1) / count)
    right: dict[Style, int] = {"direct": sum(direct.values()), "chain_of_thought": sum(thought.values())}
    return Level(steps=steps, of=count, right=right, lead=lead, low=lead - reach, high=lead + reach)


def _right(answers: Sequence[Answer], steps: int) -> dict[int, bool]:
    """Return, by item, whether the answers to the problems with `steps` steps are right."""
    return {answer["item"]: answer["right"] for answer in answers if answer["group"] == f"{steps} steps"}


def _show(console: Console, results: Results, folder: str) -> None:
    """Print the table, the verdict, and the time of training."""
    console.print(_table(results))
    ahead = ", ".join(str(level.steps) for level in results.levels if level.low > 0)
    verdict = f"ahead, with the interval clear of zero, at {ahead} steps" if ahead else "not ahead anywhere"
    console.print(f"chain of thought: {verdict}", style="bold", highlight=False)
    minutes = ", ".join(f"{style} {minutes:.1f}" for style, minutes in results.minutes_of_runs.items())
    console.print(f"minutes of training: {minutes}; results.json and proof.png in {folder}", highlight=False)


def _table(results: Results) -> Table:
    """Return a table with a row per number of steps: both accuracies and the lead."""
    levels = results.levels
    scale = f"{levels[0].of} problems per row, {results.shots} examples in context"
    title = f"share of right answers, {scale}, {results.tokens:,} training tokens per style"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("steps", "direct", "chain of thought", "lead", "95 % interval"):
        table.add_column(heading, justify="right")
    for level in levels:
        shares = [f"{level.right[style] / level.of:.3f}" for style in _STYLES]
        table.add_row(str(level.steps), *shares, f"{level.lead:+.3f}", f"{level.low:+.3f} to {level.high:+.3f}")
    return table


def draw_accuracy(levels: Sequence[Level], file: Path) -> None:
    """Draw the accuracy of both styles by number of steps, with Wilson intervals."""
    from trainer.records.charts import PLAIN, plt

    with plt.rc_context(PLAIN):
        figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
        _draw_style(axis, levels, "chain_of_thought", "#08519c", "steps written out")
        _draw_style(axis, levels, "direct", "#d98c21", "answer at once")
        axis.axhline(0.1, color="#9aa5b1", linestyle=":", label="guessing")
        axis.set_ylim(0, 1.03)
        axis.set_xticks([level.steps for level in levels])
        axis.set_xlabel("steps that the problem takes")
        axis.set_title("share of right answers, 95 % intervals")
        axis.legend(frameon=False)
        figure.savefig(file)
        plt.close(figure)


def _draw_style(axis: "Axes", levels: Sequence[Level], style: Style, colour: str, label: str) -> None:
    """Draw the accuracy of one style as a line with error bars."""
    steps = [level.steps for level in levels]
    shares = [level.right[style] / level.of for level in levels]
    bounds = [wilson(level.right[style], level.of) for level in levels]
    below = [share - low for share, (low, _) in zip(shares, bounds, strict=True)]
    above = [high - share for share, (_, high) in zip(shares, bounds, strict=True)]
    axis.errorbar(steps, shares, yerr=[below, above], color=colour, marker="o", capsize=3, label=label)
