"""Trained weights in use: loading, prompting, exporting."""
