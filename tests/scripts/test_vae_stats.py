"""Statistics of any VAE on any data, and those that training measures by itself.

python -m pytest tests/scripts/test_vae_stats.py
"""

import json
import sys

import pytest
import torch

from models.vae import build_vae, load_vae
from scripts import vae_stats
from tests.tiny import tiny_config, train_here
from utils import cli, distributed
from utils.data.images import u8_to_pm1
from utils.data.latent_stats import CHUNK, measure_latents
from utils.data.registry import open_source
from utils.training.networks import build_networks


def stats_of(monkeypatch, *words) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["vae_stats.py", *map(str, words)])
        vae_stats.main()


@pytest.mark.parametrize("name", ["tiny-f8d4", pytest.param("tiny-qwen", marks=pytest.mark.slow)])
def test_they_normalise_posterior_samples_of_held_out_images(tmp_path, monkeypatch, name):
    torch.manual_seed(1)
    build_vae(name).save(tmp_path / "vae")
    data = ["--data", "digits", "--resolution", 32, "--split", "train"]
    stats_of(monkeypatch, tmp_path / "vae", *data, "--out", tmp_path / "s.json")
    found = json.loads((tmp_path / "s.json").read_text())
    mean, std = (torch.tensor(found[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
    held_out = open_source("digits", None, 32, "test")
    x = u8_to_pm1(torch.stack([held_out[i][0] for i in range(len(held_out))]))
    with torch.no_grad():
        z = (load_vae(str(tmp_path / "vae")).encode(x).sample() - mean) / std
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    assert found["num_images"] == len(open_source("digits", None, 32, "train"))


class OneOfTwo:
    """A rank whose sums are noted, instead of being added to those of the other one."""

    world = 2

    def __init__(self, rank: int, total: torch.Tensor | None = None):
        self.rank, self.total = rank, total

    def sum(self, sums: torch.Tensor) -> torch.Tensor:
        self.own = sums
        return sums if self.total is None else self.total


def test_ranks_share_the_work_and_agree_with_one():
    """Every rank encodes its own chunks; the sums add up."""
    torch.manual_seed(1)
    vae, source = build_vae("tiny-f8d4"), open_source("digits", None, 16)
    num = 3 * CHUNK + 5
    whole = measure_latents(vae, source, num)
    ranks = [OneOfTwo(0), OneOfTwo(1)]
    for rank in ranks:
        measure_latents(vae, source, num, ranks=rank)
    total = ranks[0].own + ranks[1].own
    assert total[0].eq(num * 4).all() and ranks[0].own[0, 0] != ranks[1].own[0, 0]
    both = measure_latents(vae, source, num, ranks=OneOfTwo(0, total))
    for a, b in zip(whole, both):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_training_measures_once_and_records(tmp_path):
    """A VAE without statistics: measured at the start; a resumed run keeps the record."""
    assert train_here(tmp_path, "run.steps=2") == 0
    path = tmp_path / "tiny" / "latent_stats.json"
    record = json.loads(path.read_text())
    assert record["origin"] == "measured on 64 images of the data" and len(record["std"]) == 4
    changed = path.stat().st_mtime_ns
    assert train_here(tmp_path) == 0
    assert path.stat().st_mtime_ns == changed
    known = str(tmp_path / "tiny" / "checkpoints" / "0000004")
    more = (f"vae.weights={known}", "vae.train=false", "run.name=second", "run.steps=1")
    assert train_here(tmp_path, *more) == 0
    second = json.loads((tmp_path / "second" / "latent_stats.json").read_text())
    assert second["origin"].startswith("config of the starting VAE")
    torch.testing.assert_close(
        torch.stack(load_vae(known).latent_stats()), torch.tensor([second["mean"], second["std"]])
    )


def test_the_latent_norm_starts_with_what_was_measured():
    config = tiny_config()
    accelerator = distributed.start(config.run_dir, [], tf32=False)
    source = open_source("digits", None, config.data.resolution)
    nets, stats = build_networks(config, source, accelerator)
    torch.testing.assert_close(nets.sit.bn.running_mean.tolist(), stats["mean"])
    z = nets.vae.encode(torch.zeros(1, 3, 16, 16)).mean
    assert nets.sit.normalize(z).shape == z.shape


def test_a_wrong_vae_is_one_line(monkeypatch, capsys):
    words = ["vae_stats.py", "sdvea", "--data", "digits", "--resolution", "32"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        cli.run(vae_stats.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and "sdvae" in error and error.count("\n") == 1
