"""The ranks of adapters on experts that the fast step's kernels multiply. Imports no torch."""

LEAST_RANK = 16


def kernel_rank(rank: int) -> int:
    """Returns the rank that a kernel multiplies in place of another: a power of two, at least `LEAST_RANK`."""
    return max(LEAST_RANK, 1 << (rank - 1).bit_length())
