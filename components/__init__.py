"""The ports: Kubeflow's view of a stage. Names, types, defaults and help for the run form; one file a stage."""
