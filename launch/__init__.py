"""The `switchwork` command and job files: everything that a person types and reads."""
