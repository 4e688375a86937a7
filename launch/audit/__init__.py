"""The audit's command: it starts the workers, compares their gradients, and reports."""
