"""From the rows of a file, of the hub or of a function to tokens with labels."""
