"""MLflow: the mirror of a study, the link to it, and runs as logs."""
