"""`torchrun --nproc-per-node 2 -m trainer JOB.yaml [a.b=c ...] [--resume]`: the worker without Ray, for Slurm and for machines without Ray."""

import os
import sys
from pathlib import Path

from trainer.config import RunConfig, check
from trainer.parsing import parse, plain, read_job
from trainer.settle import prepare, resolve_run
from trainer.worker.main import run_worker
from trainer.world import place_in_environment


def main() -> int:
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    resume = "--resume" in sys.argv
    try:
        if not arguments:
            raise ValueError("which job? torchrun -m trainer JOB.yaml [a.b=c ...] [--resume]")
        job = read_job(arguments[0], arguments[1:])
        workers = place_in_environment()[1]
        run = resolve_run(
            parse(RunConfig, job.get("run") or {}, "run"), Path(arguments[0]).stem, workers, resume, numbered=False
        )
        check(run, workers)
        if place_in_environment()[0] == 0:
            prepare(run, resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(run_worker(plain(run), say=lambda line: print(line, flush=True))["failed"])


if __name__ == "__main__":
    sys.exit(main())
