"""The tasks, one module each: what `task=NAME` does."""
