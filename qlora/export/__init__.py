"""GGUF files of models and adapters, for llama.cpp and what is built on it."""
