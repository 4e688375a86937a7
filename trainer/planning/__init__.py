"""What a job needs, before any GPU is asked for."""
