"""Forecasts of a job's memory, time and checkpoints, made before it asks for any GPU."""
