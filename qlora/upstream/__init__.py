"""Private names of other libraries: one module per library, and a contract test in `tests/upstream` for each name."""
