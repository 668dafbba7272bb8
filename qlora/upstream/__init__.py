"""Every private name of another library that this project uses, one module a library, each with a contract test."""
