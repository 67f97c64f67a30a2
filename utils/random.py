"""One random generator for each key, e.g. (seed, step, rank): nothing has to be saved to resume."""

import hashlib

import torch


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for every key, e.g. (seed, step, rank)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
