"""The mixture of experts; `layer.py` walks through one forward pass."""
