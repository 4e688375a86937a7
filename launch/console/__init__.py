"""What is shown on the terminal while a command runs and when it ends."""
