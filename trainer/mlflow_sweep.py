"""The MLflow run that stands for a whole sweep: the runs of its trials name it as their parent (`tracking.parent`)."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.mlflow_run import begin_run, open_store
from trainer.run_files import RunFiles
from trainer.tracking import TrackingConfig

logging.getLogger("mlflow").setLevel(logging.WARNING)  # the command prints what a person is to see
_LONGEST = 6000  # characters of a parameter that MLflow takes


class SweepRun:
    """Made when the sweep in the folder of `files` begins, found again when it goes on; `params` are told to MLflow once."""

    def __init__(self, files: RunFiles, config: TrackingConfig, name: str, params: Mapping[str, Any]):
        self.client = open_store(config)
        if run_id := files.mlflow_run_id():
            self.run_id = run_id
            self.client.update_run(self.run_id, status="RUNNING")
            return
        self.run_id = begin_run(self.client, config, name)
        for key, value in params.items():
            self.client.log_param(self.run_id, key, str(value)[:_LONGEST])
        self.client.set_tag(self.run_id, "run_folder", files.folder.url)
        files.write_mlflow_run_id(self.run_id)

    def close(self, status: str, figures: Mapping[str, float], tags: Mapping[str, str], files: Sequence[Path]) -> None:
        """Keep what came out, and close the run with `status`: FINISHED, FAILED or KILLED."""
        for name, figure in figures.items():
            self.client.log_metric(self.run_id, name, figure)
        for name, text in tags.items():
            self.client.set_tag(self.run_id, name, text)
        for file in files:
            self.client.log_artifact(self.run_id, str(file))
        self.client.set_terminated(self.run_id, status)
