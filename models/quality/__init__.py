"""Measures of samples and representations: distances, probes, feature networks."""
