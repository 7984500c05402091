"""Real trainings that come with the package, and their weights."""
