"""What the objectives on images share."""
