"""Base models: finding, checking and loading them, their tokenizers and weight files."""
