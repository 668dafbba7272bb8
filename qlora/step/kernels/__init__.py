"""The fast parts of a QLoRA step on a GPU, each with a plain PyTorch twin."""
