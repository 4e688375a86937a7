"""Functions that the loop calls between steps: metrics, evaluation, samples, checkpoints."""
