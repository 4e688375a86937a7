"""Variational autoencoders. Their objective is trainer/objectives/vae.py."""
