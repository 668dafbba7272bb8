"""The embedded model and its rows: what a run trains and measures where nothing else is chosen."""
