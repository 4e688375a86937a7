"""The part of a job file that says where workers run."""
