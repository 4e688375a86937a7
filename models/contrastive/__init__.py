"""Contrastive learning: losses, towers, augmentation.

Its objectives are trainer/objectives/contrastive.py and two_towers.py."""
