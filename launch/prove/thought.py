"""`switchwork prove thought`: is it worth writing the steps down? Two models, alike but for the texts that they train on at equal tokens: problems
with their answers, and problems with the steps to them. Accuracy by number of steps, for both, with intervals."""

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

if TYPE_CHECKING:  # matplotlib takes a second to import, and is needed at the end
    from matplotlib.axes import Axes

RECIPE = str(CHECKOUT / "launch" / "configs" / "prove_thought.yaml")
_STYLES: tuple[Style, ...] = get_args(Style)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command's flags say."""

    max_steps: int
    """Steps of the longest problems; the shortest take one."""
    problems: int
    """Problems to be answered per number of steps."""
    shots: int
    """Worked examples before each."""
    processes: int
    """Runs at a time."""
    folder: str
    """Texts, runs, results and picture."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_steps <= 12 or self.problems < 20:
            raise ValueError(
                f"--steps {self.max_steps} and --problems {self.problems}: use 1 to 12 steps, and at least 20 problems of each"
            )


@dataclass(frozen=True, kw_only=True)
class Level:
    """Accuracy at one number of steps."""

    steps: int
    of: int
    """Problems."""
    right: dict[Style, int]
    """Right answers, by style."""
    lead: float
    """Share of right answers with the steps written out, less that without, item by item."""
    low: float
    """Lower end of the lead's 95 % interval."""
    high: float
    """Upper end of the lead's 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """What `results.json` holds."""

    job: Json
    """The run that both styles are trained by."""
    tokens: int
    """Trained on, per style."""
    shots: int
    minutes_of_runs: dict[Style, float]
    levels: list[Level]


def prove(console: Console, path: str, overrides: Sequence[str], options: Options) -> None:
    """Make the texts, train what is not trained yet, answer the problems, and show who is right how often."""
    run = parse(JobConfig, read_job(path, overrides)).run
    if not isinstance(run.objective, LanguageConfig) or run.stop.steps is None:
        raise ValueError(
            f"{path}: the proof trains a language model for a number of steps; use the objective moe_lm, and set run.stop.steps"
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
    """The run on texts of `style`, which are made: as many characters as the run reads, and some more."""
    texts = root / "texts" / f"{style}-{len(steps)}"
    write_texts(
        texts,
        style,
        steps,
        round(1.3 * (run.stop.steps or 0) * run.batch.global_batch * objective.data.seq_len),
        run.seed,
        asked,
    )
    data = replace(objective.data, source=Files(paths=(f"{texts}/*.jsonl",)))
    return named(replace(run, objective=replace(objective, data=data)), style, str(root / "runs"))


def _level(steps: int, answers: Mapping[Style, Sequence[Answer]]) -> Level:
    direct = _right(answers["direct"], steps)
    thought = _right(answers["chain_of_thought"], steps)
    differences = [thought[item] - direct[item] for item in direct]
    count = len(differences)
    lead = sum(differences) / count
    reach = 1.959964 * math.sqrt(sum((difference - lead) ** 2 for difference in differences) / (count - 1) / count)
    right: dict[Style, int] = {"direct": sum(direct.values()), "chain_of_thought": sum(thought.values())}
    return Level(steps=steps, of=count, right=right, lead=lead, low=lead - reach, high=lead + reach)


def _right(answers: Sequence[Answer], steps: int) -> dict[int, bool]:
    """Whether the answer is right, by item, of the problems that take `steps` steps."""
    return {answer["item"]: answer["right"] for answer in answers if answer["group"] == f"{steps} steps"}


def _show(console: Console, results: Results, folder: str) -> None:
    levels = results.levels
    title = f"share of right answers, {levels[0].of} problems each, {results.shots} examples in context, {results.tokens:,} training tokens for each style"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("steps", "direct", "chain of thought", "lead", "95 % interval"):
        table.add_column(heading, justify="right")
    for level in levels:
        shares = [f"{level.right[style] / level.of:.3f}" for style in _STYLES]
        table.add_row(str(level.steps), *shares, f"{level.lead:+.3f}", f"{level.low:+.3f} to {level.high:+.3f}")
    console.print(table)
    ahead = [level.steps for level in levels if level.low > 0]
    verdict = (
        f"ahead, with the interval clear of zero, at {', '.join(map(str, ahead))} steps"
        if ahead
        else "not ahead anywhere"
    )
    console.print(f"chain of thought: {verdict}", style="bold", highlight=False)
    minutes = ", ".join(f"{style} {minutes:.1f}" for style, minutes in results.minutes_of_runs.items())
    console.print(f"minutes of training: {minutes}; results.json and proof.png in {folder}", highlight=False)


def draw_accuracy(levels: Sequence[Level], file: Path) -> None:
    """Accuracy by number of steps, with Wilson intervals."""
    from trainer.records.charts import PLAIN, plt

    with plt.rc_context(PLAIN):
        figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
        _draw_style(axis, levels, "chain_of_thought", "#08519c", "steps written out")
        _draw_style(axis, levels, "direct", "#d98c21", "answer at once")
        axis.axhline(0.1, color="#9aa5b1", linestyle=":", label="a guess")
        axis.set_ylim(0, 1.03)
        axis.set_xticks([level.steps for level in levels])
        axis.set_xlabel("steps that the problem takes")
        axis.set_title("share of right answers, 95 % intervals")
        axis.legend(frameon=False)
        figure.savefig(file)
        plt.close(figure)


def _draw_style(axis: "Axes", levels: Sequence[Level], style: Style, colour: str, label: str) -> None:
    shares = [level.right[style] / level.of for level in levels]
    bounds = [wilson(level.right[style], level.of) for level in levels]
    below = [share - low for share, (low, _) in zip(shares, bounds, strict=True)]
    above = [high - share for share, (_, high) in zip(shares, bounds, strict=True)]
    axis.errorbar(
        [level.steps for level in levels], shares, yerr=[below, above], color=colour, marker="o", capsize=3, label=label
    )
