"""Pictures of a study and of a log."""
