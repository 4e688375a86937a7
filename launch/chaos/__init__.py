"""The fire drill: it injects faults into a run, and reports how the run recovered."""
