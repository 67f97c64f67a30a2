"""What is measured: the networks of a config without a download, and its data or noise.

python -m pytest tests/utils/benchmark/test_training.py        (the rest: tests/scripts)
"""

from dataclasses import replace

import pytest
import torch

import train_repae
from models.checks.errors import UserError
from tests.tiny import ROOT, tiny_config
from utils import distributed
from utils.benchmark import training as benchmark
from utils.benchmark.training import Training, open_made_up, with_random_weights
from utils.config.load import load_config
from utils.training.networks import load_pretrained


def training(*overrides: str, real_data: bool = False) -> Training:
    config = tiny_config(*overrides)
    accelerator = distributed.start(config.run_dir, [], tf32=False)
    return Training(config, accelerator, train_repae.train_step, real_data)


def test_a_published_recipe_keeps_its_networks_and_names_no_file():
    c = load_config([ROOT / "configs" / "imagenet256" / "repae-sdvae-xl2.yaml"])
    random = with_random_weights(replace(c, disc=replace(c.disc, weights="disc.pt")))
    assert random.sit == c.sit and random.run.batch_size == c.run.batch_size
    assert (random.vae.name, random.encoder.names) == (c.vae.name, c.encoder.names)
    assert random.vae.weights is random.disc.weights is random.run.init_from is None
    assert random.encoder.weights == ["random"] and random.loss.reg.lpips_weights == "random"
    assert c.vae.weights == "hub" and c.loss.reg.lpips_weights is None


@pytest.mark.slow
def test_lpips_needs_no_file_either():
    c = with_random_weights(tiny_config("loss.reg.lpips=1"))
    vae, encoders, lpips = load_pretrained(c, None)
    assert vae.latent_channels == 4 and len(encoders) == 1
    image = torch.zeros(1, 3, 16, 16)
    assert lpips is not None and lpips(image, image).item() == 0


def test_noise_has_the_classes_and_the_size_of_the_config():
    c = tiny_config("data.num_classes=7")
    images, _ = open_made_up(c)
    assert images.num_classes == 7 and images.resolution == 16
    assert open_made_up(tiny_config())[0].num_classes == 1000


def test_cached_latents_are_not_made_up():
    with pytest.raises(UserError, match=r"data.latents=here.*--data.*data.latents=null"):
        open_made_up(replace(tiny_config(), data=replace(tiny_config().data, latents="here")))


def test_the_flops_of_an_image_do_not_depend_on_their_number(monkeypatch):
    run = training("run.accumulation=2")
    two = run.flops_per_image()
    monkeypatch.setattr(benchmark, "COUNTED_IMAGES", 5)
    assert run.flops_per_image() == two > 1e8


@pytest.mark.slow
def test_what_is_recomputed_counts_again():
    """One forward more of the SiT's blocks and of the VAE."""
    plain, again = (
        training(f"run.checkpointing={name}").flops_per_image() for name in ("none", "both")
    )
    assert 1.1 * plain < again < 1.5 * plain


def test_every_term_of_the_loss_takes_part_from_the_first_step():
    run = training("loss.reg.gan_start=100", "disc.pretrain_steps=2")
    batch = next(run.batches)
    x, y = batch[0].float() / 127.5 - 1, batch[1]
    metrics = run._train(x, y, (), run.config)
    assert "loss/vae/gan" in metrics and "loss/sit/align" in metrics
    assert all(value.isfinite() for value in metrics.values())


def test_real_data_are_those_of_the_config_in_the_order_of_a_run():
    run = training("data.split=test", real_data=True)
    x_u8, y = next(run.batches)
    assert x_u8.shape == (8, 3, 16, 16) and y.max() < 10
    assert run.nets.sit.config.num_classes == 10
