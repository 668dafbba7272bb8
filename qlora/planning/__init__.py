"""What a training needs of memory and time, computed from the model's shape alone; imports no torch."""
