"""The audit of gradients: `switchwork audit` checks whether the gradients of a job are right.

The check covers the job's sharding, precision, kernels and machine. The workers make two real
optimiser steps and record them (evidence.py, collect.py, decisions.py). One process then computes
the same batches in float64, on plain networks without ranks (reference.py), and measures how far
the job's precision may deviate from that (rounding.py). The reference itself is checked by finite
differences (differences.py) and by backpropagation written out (recursion.py). At the end all of
them are compared (verdict.py).
"""
