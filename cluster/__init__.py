"""Where workers run: Ray Train, Ray Jobs, Kubernetes. The only place that knows ray or kubernetes."""
