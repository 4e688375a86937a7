"""Commands that run a job more than once: sweep, chaos and the experiments of prove."""

from typing import Annotated

import typer

from launch.cli.arguments import JobFile, Overrides, console

app = typer.Typer()

Seeds = Annotated[int, typer.Option("--seeds", help="The number of seeds, counted from the job's own.")]
Processes = Annotated[
    int | None, typer.Option("--processes", help="Runs at the same time. Default: as many as the cores allow.")
]


@app.command()
def sweep(
    file: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP.yaml", help="The job and the keys to vary, as in launch/configs/scaling_law.yaml."
        ),
    ],
    overrides: Overrides = None,
    folder: Annotated[
        str | None,
        typer.Option("--folder", help="Folder of the runs, table and picture. Default: the file's name below sweeps/."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the trials, then stop.")] = False,
) -> None:
    """Run a job with many values for some of its keys, on Ray Tune.

    The same command continues a sweep that was stopped. The exit code is 1 if a trial failed or is
    missing.
    """
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
            "--faults", metavar="FILE", help="The faults and their steps, as in launch/configs/chaos_quickstart.yaml."
        ),
    ],
    overrides: Overrides = None,
    folder: Annotated[
        str, typer.Option("--folder", help="A new folder for the two runs, drill.json and drill.png.")
    ] = "drills/chaos",
) -> None:
    """Run a fire drill: the job without faults, then with them; print the cost of each fault."""
    from launch.chaos.run import chaos as drill

    if not drill(console, job, faults, overrides or [], folder):
        raise typer.Exit(1)


prove = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Run experiments that show, with intervals, what a part of Switchwork is worth.",
)
app.add_typer(prove, name="prove")


@prove.command("moe")
def prove_moe(
    overrides: Overrides = None,
    job: Annotated[
        str | None, typer.Option("--job", metavar="JOB.yaml", help="The job. Default: launch/configs/prove_moe.yaml.")
    ] = None,
    experts: Annotated[
        str, typer.Option("--experts", help="Numbers of experts to try in addition to the job's own.")
    ] = "4,8,16",
    seeds: Seeds = 4,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="The time for all runs; the steps follow from the measured speed.")
    ] = None,
    processes: Processes = None,
    folder: Annotated[
        str, typer.Option("--folder", help="Folder of the runs, results.json and proof.png; existing runs are kept.")
    ] = "proofs/moe",
) -> None:
    """Compare a mixture of experts with a dense model at equal FLOPs, steps and data.

    A frozen and a permuted router are the controls. Prints leads with intervals, and a verdict.
    """
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
        typer.Option("--job", metavar="JOB.yaml", help="The teacher's job. Default: launch/configs/prove_moe.yaml."),
    ] = None,
    seeds: Seeds = 4,
    alpha: Annotated[float, typer.Option("--alpha", help="The teacher's share of the loss.")] = 0.25,
    temperature: Annotated[float, typer.Option("--temperature", help="The temperature of the teacher's loss.")] = 1.0,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Also train with the teacher's weights alone, and with its loss alone.")
    ] = False,
    processes: Processes = None,
    folder: Annotated[
        str, typer.Option("--folder", help="Folder of the runs, results.json and proof.png; existing runs are kept.")
    ] = "proofs/distill",
    teachers: Annotated[
        str | None,
        typer.Option(
            "--teachers", metavar="FOLDER", help="A folder of `prove moe`, whose dense and teacher runs are reused."
        ),
    ] = None,
) -> None:
    """Measure how much of the gain of a mixture of experts a dense student keeps.

    Trains the mixture, a dense model, and the dense model with the mixture as its teacher.
    """
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
        typer.Option("--job", metavar="JOB.yaml", help="The job. Default: launch/configs/prove_thought.yaml."),
    ] = None,
    max_steps: Annotated[int, typer.Option("--steps", help="The largest number of steps of a problem.")] = 6,
    problems: Annotated[int, typer.Option("--problems", help="Problems per number of steps.")] = 200,
    shots: Annotated[int, typer.Option("--shots", help="Worked examples before each problem.")] = 2,
    processes: Annotated[int, typer.Option("--processes", help="Runs at the same time.")] = 2,
    folder: Annotated[
        str,
        typer.Option("--folder", help="Folder of the texts, runs, results.json and proof.png; existing runs are kept."),
    ] = "proofs/thought",
) -> None:
    """Compare arithmetic with and without the steps written out, at equal tokens.

    Prints the accuracy by number of steps.
    """
    from launch.prove.thought import RECIPE, Options, prove

    prove(
        console,
        job or RECIPE,
        overrides or [],
        Options(max_steps=max_steps, problems=problems, shots=shots, processes=processes, folder=folder),
    )
