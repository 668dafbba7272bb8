"""Private names of other libraries, one module a library; tests/upstream checks that each still means the same."""
