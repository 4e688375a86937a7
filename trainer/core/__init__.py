"""The training loop, and the protocols of the parts that it binds: read this folder first."""
