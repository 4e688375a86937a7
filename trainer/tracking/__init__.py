"""How a run is tracked: metrics.jsonl and MLflow."""
