"""What is trained: the task protocol in `task`, and the bundled tasks beside it."""
