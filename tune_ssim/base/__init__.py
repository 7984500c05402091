"""Errors, files that are never half written, and YAML with line numbers."""
