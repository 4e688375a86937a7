"""GANs: networks, layers, losses. Their objective is trainer/objectives/gan.py."""
