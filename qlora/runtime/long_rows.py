"""From what length on rows are computed with less memory, and how; imports no torch.

Of shorter rows nothing changes. Where layers compute their activations again, a long row's feed-forward layers compute
a chunk of tokens at a time in the backward pass, and the outputs of attention are kept, so that attention, whose work
grows with the square of the length, is computed once.
"""

LONG = 16_384
"""The most tokens of a row, or of a pack, that is not long."""
CHUNK = 8_192
"""The most tokens of a long row that a feed-forward layer computes at a time."""


def is_long(length: int) -> bool:
    """Returns whether a row, or a pack, of `length` tokens is long."""
    return length > LONG


def chunk_size(tokens: int) -> int:
    """Returns the tokens of the chunks of a micro-batch of `tokens`, all about equal."""
    count = -(-tokens // CHUNK)
    return -(-tokens // count)
