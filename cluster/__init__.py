"""Where workers run. The only package that imports Ray or the Kubernetes client."""
