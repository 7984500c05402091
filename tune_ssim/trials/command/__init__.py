"""A training that is a program of its own."""
