"""Shared errors, atomic file writes, and YAML with line numbers."""
