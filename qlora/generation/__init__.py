"""Answers token by token, with a cache of fixed size and rows that take the place of those that have ended."""
