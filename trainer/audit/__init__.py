"""Are the gradients of a job right, with its sharding, precision, kernels and machine? `switchwork audit` asks.

The workers make two real optimiser steps and write down what they did (evidence.py, collect.py). One process then works the same batches out
in float64, on plain networks without ranks (reference.py), tells how far the job's precision may lie from that (rounding.py), has the
reference itself witnessed by finite differences (differences.py) and by backpropagation written out (recursion.py), and compares (verdict.py).
"""
