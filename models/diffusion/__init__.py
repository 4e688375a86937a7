"""Diffusion models: schedules, losses, samplers, networks.

Their objective is trainer/objectives/diffusion.py."""
