"""Sweeps: many runs of one job, with their trials, their results and a fitted scaling law."""
