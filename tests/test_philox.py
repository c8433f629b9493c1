"""The dropout generator against the known answers of Random123."""

from __future__ import annotations

import pytest
import torch

from fastgpt.backends.reference._philox import dropout_keep, philox_4x32

KNOWN_ANSWERS = {
    "zeros": ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "digits_of_pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def tensors(values: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.int64) for value in values)


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_known_answers(name):
    counter, key, expected = map(words, KNOWN_ANSWERS[name])
    got = philox_4x32(tensors(counter), tensors(key))
    assert tuple(int(word) for word in got) == expected


def test_mask_is_the_documented_function_of_its_indices():
    b, h, sq, sk, p, seed = 2, 3, 5, 11, 0.3, -(2**40) + 12345
    keep = dropout_keep(torch.tensor([seed]), b, h, sq, sk, p)
    assert keep.shape == (b, h, sq, sk)
    key = tensors((seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    for batch, head, row, column in ((0, 0, 0, 0), (1, 2, 4, 10), (0, 1, 3, 6), (1, 0, 2, 9)):
        lanes = philox_4x32(tensors((column // 4, row, batch * h + head, 0)), key)
        assert bool(keep[batch, head, row, column]) == (int(lanes[column % 4]) >= round(p * 2**32))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_rate(p):
    keep = dropout_keep(torch.tensor(7), 2, 2, 128, 130, p)
    # Five standard deviations of a mean of that many coin flips.
    tolerance = 5 * (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(keep.double().mean().item() - (1 - p)) <= tolerance


def test_mask_does_not_depend_on_the_size_around_it():
    seed = torch.tensor(2**63 - 5)
    large, small = dropout_keep(seed, 1, 1, 40, 50, 0.5), dropout_keep(seed, 1, 1, 7, 13, 0.5)
    assert torch.equal(large[..., :7, :13], small)
