"""A run's folder, and a repository's name, where a VAE is asked for."""

from models.vae import load_vae
from tests.exported_vaes import awake, checkpoint
from utils.checkpoint import Checkpoints, Contents
from utils.config import load_config, to_yaml


def test_a_published_vae_is_the_same_by_each_of_its_names():
    for name in ("stabilityai/sd-vae-ft-mse", "sd-vae-ft-mse", "sdvae"):
        assert load_config([], [f"vae.name={name}"]).vae.name == "sdvae"


def test_a_run_as_vae_is_its_newest_checkpoint_and_stays_that_once_the_run_has_begun(tmp_path):
    first, words = checkpoint(tmp_path / "vaes", "tiny-f8d4"), [f"vae.name={tmp_path / 'vaes'}"]
    words += [f"run.out={tmp_path}", "run.name=mine", "vae.weights=hub"]
    config = load_config([], words)
    assert config.vae.name == str(first)
    assert load_vae(config.vae.name).latent_channels == 4
    (tmp_path / "mine/checkpoints/0000001").mkdir(parents=True)
    (tmp_path / "mine/config.yaml").write_text(to_yaml(config))
    vae = Contents(awake("tiny-f8d4"))
    newer = Checkpoints(tmp_path / "vaes").save(1300, vae.write, {"seed": 0})
    assert load_config([], words).vae.name == str(first)
    assert load_config([], [*words, "run.name=other"]).vae.name == str(newer)
