"""Objectives that predict tokens."""
