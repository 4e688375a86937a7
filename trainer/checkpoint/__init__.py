"""Checkpoints: their format on disk, and how all ranks save and load them, in any layout.

Start with trainer/checkpoint/format.py, which describes a checkpoint on disk.
"""
