"""Commands that run a job more than once: sweep, chaos, prove."""

from typing import Annotated

import typer

from launch.cli.arguments import JobFile, Overrides, console

app = typer.Typer()


@app.command()
def sweep(
    file: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP.yaml", help="the job, and what is varied in it: launch/configs/scaling_law.yaml is one"
        ),
    ],
    overrides: Overrides = None,
    folder: Annotated[
        str | None, typer.Option("--folder", help="runs, table and picture; default: sweeps/ and the file's name")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check, print the trials, and stop")] = False,
) -> None:
    """A job with many values for some of its keys, by Ray Tune; goes on where it was stopped. Exit code 1 if a trial failed or is left."""
    from launch.sweep.run import show_trials
    from launch.sweep.run import sweep as run_trials

    if dry_run:
        show_trials(console, file, overrides or [], folder)
    elif not run_trials(console, file, overrides or [], folder):
        raise typer.Exit(1)


@app.command()
def chaos(
    job: JobFile,
    faults: Annotated[
        str,
        typer.Option(
            "--faults", metavar="FILE", help="what goes wrong, and when: launch/configs/chaos_quickstart.yaml is one"
        ),
    ],
    overrides: Overrides = None,
    folder: Annotated[
        str, typer.Option("--folder", help="a new folder for the two runs, drill.json and drill.png")
    ] = "drills/chaos",
) -> None:
    """A fire drill: the job without faults, then with them; ends with what each fault cost."""
    from launch.chaos.run import chaos as drill

    if not drill(console, job, faults, overrides or [], folder):
        raise typer.Exit(1)


prove = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Experiments that show what a part of this is worth, with intervals.",
)
app.add_typer(prove, name="prove")


@prove.command("moe")
def prove_moe(
    overrides: Overrides = None,
    job: Annotated[
        str | None, typer.Option("--job", metavar="JOB.yaml", help="default: the recipe launch/configs/prove_moe.yaml")
    ] = None,
    experts: Annotated[str, typer.Option("--experts", help="numbers of experts beside the job's own")] = "4,8,16",
    seeds: Annotated[int, typer.Option("--seeds", help="how many, from the job's own on")] = 4,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="time for all of it: the speed is measured, and the steps follow")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", help="runs at a time; default: as many as there are cores for")
    ] = None,
    folder: Annotated[
        str, typer.Option("--folder", help="runs, results.json and proof.png; runs that are there already are kept")
    ] = "proofs/moe",
) -> None:
    """Switch beside dense at equal FLOPs, steps and data, with a frozen and a permuted router as controls: leads with intervals, and a verdict."""
    from launch.prove.moe import RECIPE, Options, prove

    prove(
        console,
        job or RECIPE,
        overrides or [],
        Options(experts=experts, seeds=seeds, processes=processes, minutes=minutes, folder=folder),
    )


@prove.command("distill")
def prove_distill(
    overrides: Overrides = None,
    job: Annotated[
        str | None,
        typer.Option(
            "--job", metavar="JOB.yaml", help="the teacher's; default: the recipe launch/configs/prove_moe.yaml"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="how many, from the job's own on")] = 4,
    alpha: Annotated[float, typer.Option("--alpha", help="the teacher's share of the loss")] = 0.25,
    temperature: Annotated[float, typer.Option("--temperature", help="of the teacher's loss")] = 1.0,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="also with the teacher's weights alone, and with its loss alone")
    ] = False,
    processes: Annotated[
        int | None, typer.Option("--processes", help="runs at a time; default: as many as there are cores for")
    ] = None,
    folder: Annotated[
        str, typer.Option("--folder", help="runs, results.json and proof.png; runs that are there already are kept")
    ] = "proofs/distill",
    teachers: Annotated[
        str | None,
        typer.Option("--teachers", metavar="FOLDER", help="of `prove moe`, whose dense and teachers' runs are taken"),
    ] = None,
) -> None:
    """A mixture of experts, a dense model, and the dense model taught by the other: the share of the gain that it keeps, with an interval."""
    from launch.prove.distill import Options, prove
    from launch.prove.moe import RECIPE

    options = Options(
        seeds=seeds,
        alpha=alpha,
        kl_temperature=temperature,
        ablations=ablations,
        processes=processes,
        folder=folder,
        teachers=teachers,
    )
    prove(console, job or RECIPE, overrides or [], options)


@prove.command("thought")
def prove_thought(
    overrides: Overrides = None,
    job: Annotated[
        str | None,
        typer.Option("--job", metavar="JOB.yaml", help="default: the recipe launch/configs/prove_thought.yaml"),
    ] = None,
    max_steps: Annotated[int, typer.Option("--steps", help="problems take 1 to so many steps")] = 6,
    problems: Annotated[int, typer.Option("--problems", help="problems of each number of steps")] = 200,
    shots: Annotated[int, typer.Option("--shots", help="worked examples before each")] = 2,
    processes: Annotated[int, typer.Option("--processes", help="runs at a time")] = 2,
    folder: Annotated[
        str,
        typer.Option("--folder", help="texts, runs, results.json and proof.png; runs that are there already are kept"),
    ] = "proofs/thought",
) -> None:
    """Arithmetic in several steps, with the steps written out and without, at equal tokens: accuracy by number of steps."""
    from launch.prove.thought import RECIPE, Options, prove

    prove(
        console,
        job or RECIPE,
        overrides or [],
        Options(max_steps=max_steps, problems=problems, shots=shots, processes=processes, folder=folder),
    )
