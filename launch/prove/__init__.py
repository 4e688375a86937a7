"""Proofs: experiments that measure, with a confidence interval, what a part of a model is worth.

Three experiments (moe, distill, thought) share paired statistics and runs side by side.
"""
