"""MLflow's model registry: the versions of a model, and the alias `champion` for the one to use.

Every promotion of a checkpoint adds a version.
"""

import json
from collections.abc import Mapping

from trainer.parsing import one_line
from trainer.run_files import RunFiles
from trainer.storage import Folder
from trainer.tracking.config import TrackingConfig, tracking_uri

ALIAS = "champion"


class Registry:
    """The versions of the model `name` in the tracking store of `config`."""

    def __init__(self, config: TrackingConfig, name: str):
        from mlflow import MlflowClient

        self.name = name
        self.client = MlflowClient(tracking_uri(config))

    def champion(self) -> tuple[str, dict[str, float]] | None:
        """The champion's version and its metrics at promotion; None if there is no champion."""
        models = self.client.search_registered_models(f"name = '{self.name}'")
        number = models[0].aliases.get(ALIAS) if models else None
        if number is None:
            return None
        version = self.client.get_model_version(self.name, number)
        return str(number), json.loads(version.tags.get("figures", "{}"))

    def register(
        self, folder: Folder, checkpoint: Mapping[str, object], metrics: Mapping[str, float], tags: Mapping[str, str]
    ) -> str:
        """Add a version that points to a checkpoint of the run in `folder`, and return its number.

        Raises ValueError if MLflow does not know the run.
        """
        from mlflow.exceptions import MlflowException

        run_id = RunFiles(folder).mlflow_run_id()
        if run_id is None:
            reason = "has no MLflow run (tracking.enabled is false, or the run was never sent)"
            raise ValueError(f"run {folder}: {reason}; only tracked runs can be promoted")
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            raise ValueError(f"run {folder}: {one_line(error, 200)}") from None
        if not self.client.search_registered_models(f"name = '{self.name}'"):
            self.client.create_registered_model(self.name)
        self.client.log_dict(run_id, {"run_folder": folder.url, **checkpoint}, "promoted/switchwork.json")
        source = f"{run.info.artifact_uri}/promoted"
        version_tags = {**tags, "figures": json.dumps(dict(metrics))}
        version = self.client.create_model_version(self.name, source=source, run_id=run_id, tags=version_tags)
        return str(version.version)

    def crown(self, version: str) -> None:
        """Move the alias `champion` to `version`."""
        self.client.set_registered_model_alias(self.name, ALIAS, version)
