"""The loop and the protocols of what it trains: the part of the trainer to read first."""
