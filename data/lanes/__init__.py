"""Lanes: deterministic streams of samples, resumable at any step."""
