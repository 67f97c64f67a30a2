"""Standard normal noise of images, drawn on their device: a function of (seed, image, draw) alone.

Counter-based: Philox4x32-10 (Salmon et al., SC 2011) turns a counter and a key into random bits by
integer arithmetic, without a state. The key is the seed's. The counter is (block of elements, draw,
image), so no two numbers of a seed share a counter, and the batch, the rank and the order in which
images are made change nothing. Draw 0 is the noise that sampling starts from, draws 1, 2, ... are
those of the stochastic steps.

Two uniform numbers become two normal ones by Box-Muller in float64, rounded to float32: the
logarithms and cosines of two devices differ in their last bit, which the rounding hides but for
about one number in 10^8.

N images, D draws, E elements of an image, B = ceil(E / 4) blocks of four of them.
"""

import hashlib
import math
from collections.abc import Sequence

import torch

# Of the integer arithmetic: 32 bits in int64, whose products wrap around modulo 2^64.
WORD = 0xFFFF_FFFF
# The constants of Philox4x32: multipliers, and what is added to the key after each round.
MULTIPLIERS = (0xD251_1F53, 0xCD9E_8D57)
KEY_STEPS = (0x9E37_79B9, 0xBB67_AE85)
# Numbers that are made at a time: on the CPU the memory of that stays in its cache, and all cores
# take part; on GPUs, few launches of kernels make those of many steps, in about 200 MB.
AT_ONCE = {"cpu": 2**18, "cuda": 2**23}


class ImageNoise:
    """The noise of some images of a seed, for `utils.samplers.sample`."""

    def __init__(self, seed: int, images: range, device: torch.device | str = "cpu"):
        self.key = key_of(seed)
        # filled on the device: a copy from the CPU would wait for the GPU to run dry
        self.images = torch.arange(images.start, images.stop, images.step, device=device)
        self._at_once = AT_ONCE.get(self.images.device.type, AT_ONCE["cuda"])
        self._ahead, self._first = torch.empty(0), 0

    def start(self, *shape: int) -> torch.Tensor:
        """(N, *shape) float32: the noise at time 1."""
        return self._draw(0, 1, math.prod(shape)).view(-1, *shape)

    def __call__(self, x: torch.Tensor, draw: int) -> torch.Tensor:
        """Number `draw` = 1, 2, ... of x's shape (N, ...) and dtype. Of small batches, several are
        made ahead at a time, at most as many as there were before."""
        assert len(x) == len(self.images) and draw >= 1, (len(x), len(self.images), draw)
        if not self._first <= draw < self._first + len(self._ahead):
            num = max(1, min(draw, self._at_once // x.numel()))
            self._ahead, self._first = self._draw(draw, num, x[0].numel()), draw
        return self._ahead[draw - self._first].view(x.shape).to(x.dtype)

    def _draw(self, first: int, num: int, size: int) -> torch.Tensor:
        """(num, N, size) float32: draws first ... first + num - 1."""
        draws = torch.arange(first, first + num, device=self.images.device)
        parts = self.images.split(max(1, self._at_once // (num * size)))
        return torch.cat([standard_normal(self.key, some, draws, size) for some in parts], dim=1)


def key_of(seed: int) -> tuple[int, int]:
    """The two words of a seed of any size: 64 bits of its hash."""
    digest = hashlib.blake2b(f"noise/{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def standard_normal(
    key: tuple[int, int], images: torch.Tensor, draws: torch.Tensor, size: int
) -> torch.Tensor:
    """images (N,), draws (D,), both int64 => (D, N, size) float32, on their device.

    Of block b, the words 0 and 1 give the elements b and B + b, the words 2 and 3 give 2 B + b and
    3 B + b.
    """
    num = -(-size // 4)
    block = torch.arange(num, device=images.device)
    # small tensors that broadcast to (D, N, num): the first rounds work on them as they are
    counter = (block, draws[:, None, None], (images & WORD)[:, None], (images >> 32)[:, None])
    words = philox4x32(counter, key)
    noise = torch.empty(len(draws), len(images), 4, num, device=images.device)
    for pair in (0, 2):
        # in (0, 1): neither 0, whose logarithm is infinite, nor 1
        radius = words[pair].double().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = words[pair + 1].double().mul_(2 * math.pi * 2.0**-32)
        torch.mul(radius, angle.cos(), out=noise[:, :, pair])
        torch.mul(radius, angle.sin_(), out=noise[:, :, pair + 1])
    return noise.flatten(2)[:, :, :size]


def philox4x32(
    counter: Sequence[torch.Tensor], key: tuple[int, int], rounds: int = 10
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four words of random bits from the four words of a counter, all int64 in [0, 2^32), of shapes
    that broadcast.

    A product has 64 bits: its high word is masked together with what is added to it, its low word
    only where the bits above would matter.
    """
    (c0, c1, c2, c3), (key0, key1) = counter, key
    for _ in range(rounds):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1).bitwise_xor_(key0).bitwise_and_(WORD)
        c2 = ((product0 >> 32) ^ c3).bitwise_xor_(key1).bitwise_and_(WORD)
        c1, c3 = product1, product0
        key0, key1 = (key0 + KEY_STEPS[0]) & WORD, (key1 + KEY_STEPS[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD
