"""Triton kernels of a decode step. Their twins are the plain code; `TRITON_INTERPRET=1` runs them on a CPU."""
