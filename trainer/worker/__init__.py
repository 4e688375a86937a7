"""Puts the parts of a run together in a worker, from its config to its summary."""
