"""The compositions: one file is one entry on the Kubeflow page."""
