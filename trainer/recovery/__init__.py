"""How a run recovers: from a checkpoint, from a hang, from a request to stop."""
