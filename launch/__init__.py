"""What a person types: the `switchwork` command, job files, planning and printing."""
