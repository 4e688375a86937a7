"""One worker of a run: its loop, objectives, engines, checkpoints, tracking. Never imports Ray."""
