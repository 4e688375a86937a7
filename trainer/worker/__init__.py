"""Puts a run together in a worker, from its config to its summary."""
