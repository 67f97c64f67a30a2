"""Statistics of any VAE on any data, and those that training measures by itself.

python -m pytest tests/scripts/test_vae_stats.py
"""

import json
import sys

import pytest
import torch

from models.vae import build_vae, load_vae
from scripts import vae_stats
from tests.tiny import run_script, start, tiny_config, train_here
from utils.data import open_source
from utils.images import u8_to_pm1
from utils.latent_stats import CHUNK, measure_latents


def stats_of(monkeypatch, *words) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["vae_stats.py", *map(str, words)])
        vae_stats.main()


@pytest.mark.parametrize("name", ["tiny-f8d4", "tiny-qwen"])
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


def test_ranks_share_the_work_and_agree_with_one():
    """Every rank encodes its own chunks; the sums add up."""
    torch.manual_seed(1)
    vae, source = build_vae("tiny-f8d4"), open_source("digits", None, 16)
    num = 3 * CHUNK + 5
    whole = measure_latents(vae, source, num)
    parts = []
    for rank in (0, 1):
        note = lambda sums: parts.append(sums.clone()) or sums  # noqa: E731
        measure_latents(vae, source, num, rank=rank, ranks=2, sum_over_ranks=note)
    assert (parts[0][0] + parts[1][0]).eq(num * 4).all() and parts[0][0, 0] != parts[1][0, 0]
    both = measure_latents(vae, source, num, sum_over_ranks=lambda _: parts[0] + parts[1])
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
    nets, _ = start(tiny_config())
    torch.testing.assert_close(nets.sit.bn.running_mean.tolist(), nets.starting_stats["mean"])
    z = nets.vae.encode(torch.zeros(1, 3, 16, 16)).mean
    assert nets.sit.normalize(z).shape == z.shape


def test_a_wrong_vae_is_one_line(tmp_path):
    done = run_script("scripts/vae_stats.py", "sdvea", "--data", "digits", "--resolution", "32")
    assert done.returncode == 2 and "sdvae" in done.stderr and done.stderr.count("\n") == 1
