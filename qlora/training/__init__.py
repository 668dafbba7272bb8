"""The trainer, its callbacks and trackers."""
