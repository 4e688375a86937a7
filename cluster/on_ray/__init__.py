"""Workers on a Ray cluster, through Ray Train, Ray Tune and the Ray Jobs API."""
