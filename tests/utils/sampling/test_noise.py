"""The noise of images: Philox as published, normal, and the same whatever is made beside it.

python -m pytest tests/utils/sampling/test_noise.py
"""

import itertools
import math

import pytest
import torch

from utils.sampling import noise
from utils.sampling.noise import ImageNoise, key_of, philox4x32

# Known answers of Random123: counter, key, output of Philox4x32-10, in hexadecimal.
KNOWN = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
SHAPE = (4, 8, 8)


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_the_known_answers_of_philox(counter, key, answer):
    found = philox4x32([torch.tensor([word]) for word in words(counter)], words(key))
    assert tuple(map(int, found)) == words(answer)


def plain_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's whole numbers, from the text of the paper (Sec. 3)."""
    low = 2**32
    for number in range(10):
        c0, c1, c2, c3 = counter
        k0, k1 = ((k + number * w) % low for k, w in zip(key, (0x9E3779B9, 0xBB67AE85)))
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        counter = (p1 // low ^ c1 ^ k0, p1 % low, p0 // low ^ c3 ^ k1, p0 % low)
    return counter


def test_a_number_is_that_of_its_counter_by_box_muller():
    """Whole numbers and double precision in plain Python, for a few elements, images and draws."""
    first, x = 2**32 + 5, torch.empty(2, 3, 5)  # of 15 elements: the last block is not used up
    drawn = ImageNoise(9, range(first, first + 2))
    for (image, draw), element in itertools.product([(0, 1), (1, 2)], (0, 3, 4, 8, 11, 12, 14)):
        place, block = divmod(element, 4)
        made = plain_philox((block, draw, (first + image) % 2**32, 1), key_of(9))
        u, angle = made[place // 2 * 2], made[place // 2 * 2 + 1]
        radius = math.sqrt(-2 * math.log((u + 0.5) / 2**32))
        side = math.sin if place % 2 else math.cos
        expected = torch.tensor(radius * side(2 * math.pi * angle / 2**32), dtype=torch.float32)
        found = drawn(x, draw)[image].flatten()[element]
        torch.testing.assert_close(found, expected, rtol=3e-7, atol=3e-7)


def test_every_bit_of_an_image_is_the_same_in_any_batch_and_order(monkeypatch):
    """Also where several draws are made ahead, or a batch in pieces, as on GPUs and on the CPU."""
    whole = ImageNoise(1, range(100, 112))
    expected = [whole.start(*SHAPE)] + [whole(whole.start(*SHAPE), draw) for draw in range(1, 8)]
    for at_once in (1, 700, 2**23):
        monkeypatch.setitem(noise.AT_ONCE, "cpu", at_once)
        for start, stop in ((100, 112), (100, 101), (103, 110)):
            part = ImageNoise(1, range(start, stop))
            rows = slice(start - 100, stop - 100)
            assert torch.equal(part.start(*SHAPE), expected[0][rows])
            for draw in (5, 1, 2, 3, 4, 6, 7, 1):
                found = part(expected[0][rows].double(), draw)
                assert found.dtype == torch.float64
                assert torch.equal(found.float(), expected[draw][rows])


def test_no_two_of_seeds_images_and_draws_share_a_number():
    many = []
    for seed in (0, 1, 2**40, 2**70):
        drawn, x = ImageNoise(seed, range(50)), torch.empty(50, 64)
        many += [drawn.start(64), *(drawn(x, draw) for draw in range(1, 10))]
    rows = torch.cat(many)
    assert len(rows.unique(dim=0)) == len(rows) == 2000
    # of 128,000 numbers in float32 some are equal by chance, in the middle of the distribution
    assert len(rows.flatten().unique()) > 0.98 * rows.numel()


@pytest.fixture(scope="module")
def numbers():
    """(seeds, draws, images, elements)."""
    x = torch.empty(40, 512)
    return torch.stack([
        torch.stack([ImageNoise(seed, range(40))(x, draw) for draw in range(1, 9)])
        for seed in range(4)
    ])  # fmt: skip


def test_moments(numbers):
    """Of 655,360 numbers: within 4 standard errors of those of N(0, 1)."""
    x, bound = numbers.double().flatten(), 4 / math.sqrt(numbers.numel())
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - expected) < bound * math.sqrt(spread), power
    assert 4.2 < float(x.abs().max()) < 6.77  # 6.76 is the largest that 32 bits can give


def test_kolmogorov_smirnov(numbers):
    x = numbers.double().flatten().sort().values
    steps = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    normal = torch.special.ndtr(x)
    distance = max(float((steps[1:] - normal).max()), float((normal - steps[:-1]).max()))
    assert distance * math.sqrt(len(x)) < 1.63  # at level 0.01


@pytest.mark.parametrize("dim", range(4))
def test_neighbours_are_independent(numbers, dim):
    """Correlation of numbers and of their squares, between seeds, draws, images and elements."""
    x = numbers.double()
    a, b = x.narrow(dim, 0, x.shape[dim] - 1), x.narrow(dim, 1, x.shape[dim] - 1)
    for f in (lambda v: v, lambda v: v**2 - 1):
        product = f(a) * f(b)
        assert abs(float(product.mean())) < 4 * float(product.std()) / math.sqrt(product.numel())


def test_the_numbers_of_one_block_are_independent(numbers):
    """Box-Muller makes pairs of one radius, which end up a quarter of the elements apart."""
    quarters = numbers.double().unflatten(-1, (4, -1)).movedim(-2, 0).flatten(1)
    assert (torch.corrcoef(quarters) - torch.eye(4)).abs().max() < 4 / math.sqrt(quarters.shape[1])
    squares = torch.corrcoef(quarters**2) - torch.eye(4)
    assert squares.abs().max() < 4 / math.sqrt(quarters.shape[1])


@pytest.mark.gpu
def test_the_gpu_makes_the_numbers_of_the_cpu():
    """To the last bit, but for those whose double-precision logarithms round apart."""
    on_cpu, on_gpu = ImageNoise(3, range(64)), ImageNoise(3, range(64), "cuda")
    x = torch.empty(64, 4, 32, 32)
    for draw in (1, 2, 3):
        a, b = on_cpu(x, draw), on_gpu(x.cuda(), draw).cpu()
        assert (a != b).float().mean() < 1e-6
        torch.testing.assert_close(a, b, rtol=2e-7, atol=1e-10)
