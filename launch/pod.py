"""What runs in the head pod of a RayJob: the job comes in the environment, and goes on where an earlier try of the same job ended.

A try is known by its job's id, which stands in the run folder: another job of the same name is refused, not mixed in.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import yaml

from launch.cli.__main__ import main as switchwork
from trainer.run_files import run_files
from trainer.storage import absolute


def main() -> None:
    """Train the job in SWITCHWORK_JOB."""
    given = json.loads(os.environ["SWITCHWORK_JOB"])
    run = given["job"]["run"]
    files = run_files(absolute(run["root"]), run["name"])
    resume = files.has_begun and (given["resume"] or files.job_id() == given["id"])
    if resume or not files.has_begun:
        files.folder.make()
        files.write_job_id(given["id"])
    file = Path(tempfile.mkdtemp()) / f"{run['name']}.yaml"
    file.write_text(yaml.safe_dump(given["job"], sort_keys=False))
    sys.argv = ["switchwork", "train", str(file), *(["--resume"] if resume else [])]
    switchwork()


if __name__ == "__main__":
    main()
