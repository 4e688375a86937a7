"""MLflow's model registry: versions of a model, one for each run that asks, and the alias `champion` on the one to use."""

import json
from collections.abc import Mapping
from typing import Any

from trainer.parsing import one_line
from trainer.run_files import RunFiles
from trainer.storage import Folder
from trainer.tracking.config import TrackingConfig, tracking_uri

ALIAS = "champion"


class Registry:
    """The versions of the model `name` in the tracking store of `config`."""

    def __init__(self, config: TrackingConfig, name: str):
        from mlflow import MlflowClient

        self.name, self.client = name, MlflowClient(tracking_uri(config))

    def champion(self) -> tuple[str, dict[str, float]] | None:
        """The champion's version and its figures when it was promoted; None where there is none."""
        found = self.client.search_registered_models(f"name = '{self.name}'")
        number = found[0].aliases.get(ALIAS) if found else None
        if number is None:
            return None
        version = self.client.get_model_version(self.name, number)
        return str(number), json.loads(version.tags.get("figures", "{}"))

    def register(
        self, folder: Folder, checkpoint: Mapping[str, Any], figures: Mapping[str, float], tags: Mapping[str, str]
    ) -> str:
        """A new version that points to a checkpoint of the run in `folder`; returns its number. Raises ValueError if MLflow does not know the run."""
        from mlflow.exceptions import MlflowException

        run_id = RunFiles(folder).mlflow_run_id()
        if run_id is None:
            raise ValueError(
                f"run {folder}: it has no MLflow run (tracking.enabled is false, or it was never sent); only tracked runs can be promoted"
            )
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            raise ValueError(f"run {folder}: {one_line(error, 200)}") from None
        if not self.client.search_registered_models(f"name = '{self.name}'"):
            self.client.create_registered_model(self.name)
        self.client.log_dict(run_id, {"run_folder": folder.url, **checkpoint}, "promoted/switchwork.json")
        source = f"{run.info.artifact_uri}/promoted"
        version = self.client.create_model_version(
            self.name, source=source, run_id=run_id, tags={**tags, "figures": json.dumps(dict(figures))}
        )
        return str(version.version)

    def crown(self, version: str) -> None:
        """Move the alias to `version`."""
        self.client.set_registered_model_alias(self.name, ALIAS, version)
