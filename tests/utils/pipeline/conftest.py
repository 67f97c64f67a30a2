"""Small checkpoints of SiT and VAE, with names of classes."""

import pytest
import torch

from models.sit import SiT
from models.vae import build_vae
from utils.checkpoint import Checkpoints, Contents
from utils.pipeline.pipeline import RepaePipeline
from utils.sealed import ModelIndex

CLASSES = ["n01440764", "golden retriever, yellow dog", "Crane", "crane", "5", "", "owl", "7"]


@pytest.fixture(scope="session")
def make_run(tmp_path_factory):
    """A run with one sealed checkpoint of random weights; returns the folder of the checkpoint. At
    its own initialisation a SiT answers zero."""

    def make(vae_name: str = "tiny-f2d4", path: str = "linear", index: bool = True, **changes):
        torch.manual_seed(0)
        vae = build_vae(vae_name).eval()
        shape = {"hidden_size": 32, "depth": 2, "num_heads": 2, "align_depth": 1}
        shape |= {"encoder_dims": [8], "input_size": 8, "projector_dim": 16}
        shape |= {"num_classes": len(CLASSES), "in_channels": vae.latent_channels} | changes
        sit = SiT(**shape).eval()
        for p in sit.parameters():
            torch.nn.init.normal_(p, std=0.2)
        sit.bn.set_stats(torch.full((vae.latent_channels,), 0.3), torch.tensor(1.5))
        names = {str(label): name for label, name in enumerate(CLASSES) if name}
        content = Contents(vae, sit.bn.stats(), ema=sit)
        content.index = ModelIndex(path, names) if index else None
        run = tmp_path_factory.mktemp("run")
        state = {"path": path, "classes": CLASSES}
        return Checkpoints(run).save(1200, content.write, state)

    return make


@pytest.fixture(scope="session")
def checkpoint(make_run):
    return make_run()


@pytest.fixture(scope="session")
def pipe(checkpoint):
    """Not to be changed."""
    pipe = RepaePipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe
