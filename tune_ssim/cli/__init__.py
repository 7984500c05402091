"""What people type and see: verbs, tables, live progress, exit codes."""
