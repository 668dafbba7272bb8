"""Loss, generated answers and metrics on held-out rows."""
