"""Private names of other libraries, one module a library; a contract test checks each against what is installed."""
