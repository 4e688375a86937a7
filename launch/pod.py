"""What runs in the head pod of a RayJob: the job comes in the environment, and goes on where an earlier try of the same job ended.

A try is known by its job's id, which stands in the run folder: another job of the same name is refused, not mixed in.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import yaml

from launch.cli import main as switchwork
from trainer.storage import Folder, absolute


def main() -> None:
    """Train the job in SWITCHWORK_JOB."""
    given = json.loads(os.environ["SWITCHWORK_JOB"])
    run = given["job"]["run"]
    folder = Folder(absolute(f"{run['root']}/{run['name']}"))
    resume = folder.exists("attempts.jsonl") and (given["resume"] or _made_by(folder) == given["id"])
    if resume or not folder.exists("attempts.jsonl"):
        folder.make().write("job_id", given["id"].encode())
    file = Path(tempfile.mkdtemp()) / f"{run['name']}.yaml"
    file.write_text(yaml.safe_dump(given["job"], sort_keys=False))
    sys.argv = ["switchwork", "train", str(file), *(["--resume"] if resume else [])]
    switchwork()


def _made_by(folder: Folder) -> str:
    return folder.read("job_id").decode() if folder.exists("job_id") else ""


if __name__ == "__main__":
    main()
