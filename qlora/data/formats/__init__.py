"""What the columns of a row mean, and how a data set's format is recognised."""
