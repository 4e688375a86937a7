"""The `switchwork` command: its verbs and their options, nothing else."""
