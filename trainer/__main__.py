"""The worker without Ray, for Slurm and for machines on which Ray is not installed.

torchrun --nproc-per-node 2 -m trainer JOB.yaml [a.b=c ...] [--resume]
"""

import os
import sys
from pathlib import Path

from trainer.config import RunConfig, check
from trainer.parsing import parse, plain, read_job
from trainer.settle import prepare, resolve_run
from trainer.worker.main import run_worker
from trainer.world import rank_and_size


def main() -> int:
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    resume = "--resume" in sys.argv
    try:
        if not arguments:
            raise ValueError("no job file; use torchrun -m trainer JOB.yaml [a.b=c ...] [--resume]")
        job = read_job(arguments[0], arguments[1:])
        rank, workers = rank_and_size()
        wanted = parse(RunConfig, job.get("run") or {}, "run")
        run = resolve_run(wanted, Path(arguments[0]).stem, workers, resume, numbered=False)
        check(run, workers)
        if rank == 0:
            prepare(run, resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(run_worker(plain(run), say=lambda line: print(line, flush=True))["failed"])


if __name__ == "__main__":
    sys.exit(main())
