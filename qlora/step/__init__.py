"""The fast training step and its kernels."""
