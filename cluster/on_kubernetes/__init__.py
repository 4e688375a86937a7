"""Jobs on Kubernetes, as KubeRay's RayJobs."""
