"""What a checkpoint is, and how it is saved and loaded."""
