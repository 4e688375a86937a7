"""Many runs of one job: their settings, their trials, their results, and a scaling law through them."""
