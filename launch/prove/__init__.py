"""Proofs: experiments that say, with an interval, what a part of a model is worth."""
