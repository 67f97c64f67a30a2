"""A random Inception whose features differ between images, and textures to feed it.

PyTorch's default initialisation gives features of 1e-8. This one has He-normal convolutions, batch
norms with random affine parameters, and running statistics from one batch of textures. NumPy's
PCG64 draws them and not torch, so that the numbers survive torch upgrades.
"""

from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception


def textures(n: int, seed: int, size: int = 64) -> torch.Tensor:
    """(n, 3, size, size) uint8: noise of several scales; `seed` also moves the brightness."""
    rng = np.random.Generator(np.random.PCG64(seed))
    x = np.full((n, 3, size, size), 110.0 + 10 * seed)
    for side in (4, 8, 16, size):
        scale = size // side
        x += 40 * np.kron(rng.standard_normal((n, 3, side, side)), np.ones((1, 1, scale, scale)))
    return torch.from_numpy(np.clip(x, 0, 255).astype(np.uint8))


def bare_inception() -> Inception:
    """Without the weights of a file."""
    with (
        mock.patch("torch.load", return_value={}),
        mock.patch.object(Inception, "load_state_dict", return_value=None),
    ):
        return Inception("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")


@torch.no_grad()
def save_random_inception(path: Path) -> None:
    """Write a state dict that torch-fidelity loads as its weight file."""
    net = bare_inception()
    rng = np.random.Generator(np.random.PCG64(0))

    def normal(tensor: torch.Tensor, std: float) -> None:
        tensor.copy_(torch.from_numpy(std * rng.standard_normal(tuple(tensor.shape))))

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            normal(module.weight, (2 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, module.num_features)))
            normal(module.bias, 0.3)
            module.momentum = None
            module.train()
    normal(net.fc.weight, 0.03)
    normal(net.fc.bias, 0.1)
    net(textures(16, 0))
    torch.save(net.eval().state_dict(), path)
