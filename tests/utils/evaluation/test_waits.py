"""A pass over images keeps a GPU busy: in no batch does the host wait for it. Counted on CUDA
tensors without content, on any machine.

python -m pytest tests/utils/evaluation/test_waits.py
"""

import numpy as np
import pytest
import torch

from models.vae import load_vae
from tests.random_inception import bare_inception, textures
from utils.cost.counter import Counter
from utils.cost.fake_cuda import fake_cuda, new_mode
from utils.cost.fake_run import _materialise
from utils.distributed import Ranks
from utils.evaluation.formulas.pictures import _gaussian_filter
from utils.evaluation.images.image_sets import open_images
from utils.evaluation.metrics import VAE_METRICS
from utils.evaluation.networks import ADMInception, FeatureNet, _on, load_features
from utils.evaluation.reconstruction import Reconstruction
from utils.evaluation.statistics import Collector, rank_batches

CUDA = torch.device("cuda")


@pytest.fixture
def counter():
    """Counts what is done with tensors on a GPU that is not there."""
    _gaussian_filter.cache_clear()
    with fake_cuda(new_mode()), Counter() as counting:
        yield counting
    _gaussian_filter.cache_clear()  # it holds tensors without content


def waits(counter: Counter) -> list[str]:
    return [each.op.name for each in counter.counted if each.op.waits]


def batch(side: int = 64) -> torch.Tensor:
    """As a reader gives it: on the CPU, in channels-last memory."""
    return torch.zeros(4, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)


def test_the_counter_sees_masks_and_copies(counter):
    x, mask = torch.zeros(4, 3, device=CUDA), torch.tensor([True, False, True, True])
    x[mask.to(CUDA)].cpu()
    x.sum().item()
    assert len(waits(counter)) == 4


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_collecting_features(counter, groups):
    collector = Collector(60, 8, Ranks(False, CUDA), keep_rows=True, groups=groups)
    feats = torch.zeros(16, 8, device=CUDA)
    counter.counted.clear()
    for start, n in ((0, 16), (16, 16), (32, 16), (48, 12)):
        collector.add(feats[:n], start, 16)
    assert counter.counted
    assert not waits(counter)


@pytest.mark.slow
def test_the_features_of_inception(counter):
    """Of its convolutions only the first one, behind the resize, is given another layout."""
    with torch.device("meta"):
        inception = ADMInception(bare_inception())
    _materialise(inception.net)
    _on(inception.net, CUDA)
    net = FeatureNet("inception", "", False, {}, CUDA, inception.features)
    counter.counted.clear()
    net(batch())
    assert not waits(counter)
    convolutions = [each.op for each in counter.counted if "convolution" in each.op.name]
    assert len(convolutions) == 94
    assert sum(op.copies > 0 for op in convolutions) == 1


@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_reconstructing_images(counter, posterior):
    with torch.device("meta"):
        vae = load_vae("tiny-f8d4", None)
    _materialise(vae)
    metrics = [VAE_METRICS[name] for name in ("psnr", "ssim", "latents")]
    run = Reconstruction(vae, metrics, posterior=posterior, seed=0, lpips=None)
    for start in (0, 4):
        counter.counted.clear()
        run.add(batch().to(CUDA, non_blocking=True), start, 4)
    assert not waits(counter)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 3])
def test_a_pass_on_a_real_gpu(groups):
    """Reading, uploading, features and their moments; the numbers are those of the CPU."""
    pictures = textures(200, 1, 32)
    images, found = open_images(pictures), []
    for device in (torch.device("cpu"), CUDA, CUDA):  # the first time, kernels are loaded
        net, ranks = load_features("pixel", device=device), Ranks(False, device)
        collector = Collector(200, 432, ranks, keep_rows=True, groups=groups)
        torch.cuda.set_sync_debug_mode("error" if len(found) == 2 else "default")
        try:
            for x_u8, start, n in rank_batches(images, ranks, 16, None, workers=2):
                collector.add(net(x_u8, prepared=True)["pool"][:n], start, 16)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append(collector.result())
    for each in found[1:]:
        np.testing.assert_allclose(each.rows, found[0].rows, rtol=1e-5)
        np.testing.assert_allclose(each.cov, found[0].cov, rtol=1e-3, atol=1e-6)
