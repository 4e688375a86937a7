"""The commands of `switchwork`, one file per verb."""
