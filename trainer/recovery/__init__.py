"""How a run survives faults: resuming, rollbacks, requests to stop, hangs, and injected faults."""
