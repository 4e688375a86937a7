"""Objectives that predict tokens, and the starts of their weights."""
