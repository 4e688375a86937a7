"""The terminal's contents while a command runs and after it ends."""
