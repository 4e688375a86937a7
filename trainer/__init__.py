"""One worker of a run: its loop, objectives, engines, checkpoints and tracking. Never imports Ray."""
