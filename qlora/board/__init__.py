"""`task=board`: one page for all runs and sweeps of a folder, served on this machine alone."""
