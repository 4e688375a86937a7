"""The entrypoint of a RayJob, which trains the job that comes in the head pod's environment.

A retry of the job continues where an earlier try ended. The run folder holds the job's id, so that
another job with the same run name is refused instead of continuing a run that is not its own.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import yaml

from cluster.submission import PodJob
from launch.cli.__main__ import main as switchwork
from trainer.run_files import run_files
from trainer.storage import absolute


def main() -> None:
    """Train the job in the environment variable SWITCHWORK_JOB."""
    pod_job: PodJob = json.loads(os.environ["SWITCHWORK_JOB"])
    run = pod_job["job"]["run"]
    files = run_files(absolute(run["root"]), run["name"])
    resume = files.has_begun and (pod_job["resume"] or files.job_id() == pod_job["id"])
    if resume or not files.has_begun:
        files.folder.make()
        files.write_job_id(pod_job["id"])
    file = Path(tempfile.mkdtemp()) / f"{run['name']}.yaml"
    file.write_text(yaml.safe_dump(pod_job["job"], sort_keys=False))
    sys.argv = ["switchwork", "train", str(file), *(["--resume"] if resume else [])]
    switchwork()


if __name__ == "__main__":
    main()
