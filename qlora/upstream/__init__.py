"""The private names of other libraries that this package uses, one module a library, each with a contract test."""
