"""Compares what an engine serves with what was trained."""
