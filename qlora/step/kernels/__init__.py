"""The kernels of the fast step: autograd functions and operators, each with a twin in plain PyTorch."""
