"""The tracking of runs: metrics.jsonl in the run folder, MLflow, and its model registry."""
