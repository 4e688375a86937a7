"""What happens between steps: metrics, evaluation, samples, checkpoints."""
