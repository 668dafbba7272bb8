"""Memory and time of a training run, computed from the model's shape alone; imports no torch."""
