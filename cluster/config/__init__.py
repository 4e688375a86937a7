"""The section `cluster` of a job file: workers, their nodes, and their pods on Kubernetes."""
