"""The mask of dropout that can be computed again: the share that it says, and nothing that goes together."""

import pytest
import torch

from qlora.step.kernels.dropout import keep_mask

ROWS, COLUMNS = 512, 768


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_elements_stay_with_the_probability_that_is_asked_for(rate: float) -> None:
    torch.manual_seed(0)
    mask = keep_mask(torch.empty(ROWS, COLUMNS), rate).float()
    deviation = (rate * (1 - rate)) ** 0.5
    assert mask.mean().item() == pytest.approx(1 - rate, abs=4 * deviation / (ROWS * COLUMNS) ** 0.5)
    for dim, count in ((0, ROWS), (1, COLUMNS)):
        assert mask.mean(dim).std().item() == pytest.approx(deviation / count**0.5, rel=0.15)


def test_no_two_positions_and_no_two_masks_are_correlated() -> None:
    torch.manual_seed(0)
    first, second = ((keep_mask(torch.empty(ROWS, COLUMNS), 0.5).float() - 0.5).flatten() for _ in range(2))
    spectrum, other = torch.fft.rfft(first), torch.fft.rfft(second)
    count = len(first)
    local = torch.fft.irfft(spectrum * spectrum.conj(), n=count)[1:]
    cross = torch.fft.irfft(spectrum * other.conj(), n=count)
    for actual in (local, cross):  # each a sum of `count` products of 1/4 or -1/4: over all shifts some 5 deviations
        assert actual.abs().max() / (0.25 * count**0.5) < 6


def test_a_mask_follows_the_generator() -> None:
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(keep_mask(torch.empty(ROWS, COLUMNS), 0.5))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
