"""Private names of other libraries: one module a library, and a contract test in `tests/upstream` for each name."""
