"""Exported VAEs: what plain diffusers reads, statistics that normalise, refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checks.errors import UserError
from models.discriminator import PatchGAN
from models.vae import load_vae
from tests.exported_vaes import FAMILIES, awake, checkpoint, digits
from tests.tiny import ROOT
from utils.checkpoint import DISCRIMINATOR
from utils.data import latent_stats
from utils.data.registry import open_source
from utils.published import exporting
from utils.published.exporting import export_vae, upload
from utils.sealed import STATE, seal_checkpoint

PLAIN_DIFFUSERS = """
import sys
import diffusers, torch
from safetensors.torch import load_file, save_file
assert {root!r} not in sys.path and "models" not in sys.modules
torch.set_num_threads(1)
found = {{}}
for name, cls, folder in {exports!r}:
    net = getattr(diffusers, cls).from_pretrained(folder)
    x = load_file({images!r})[name]
    with torch.no_grad():
        x = x.unsqueeze(2) if "Qwen" in cls else x
        z = net.encode(x).latent_dist.mode()
        x_hat = net.decode(z).sample
    found[name] = (x_hat.squeeze(2) if "Qwen" in cls else x_hat).contiguous()
    assert len(net.config.latents_mean) == len(net.config.latents_std) == z.shape[1]
save_file(found, {out!r})
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for name in FAMILIES:
        export_vae(checkpoint(root / f"run-{name}", name), root / name)
    return {name: root / name for name in FAMILIES}


@pytest.mark.slow
def test_plain_diffusers_in_a_fresh_process_reconstructs_bit_for_bit(exports, tmp_path, one_thread):
    images = {name: digits(32, "test", 6) for name in FAMILIES}
    save_file(images, tmp_path / "x.safetensors")
    known = [(n, type(awake(n).net).__name__, str(exports[n])) for n in FAMILIES]
    code = PLAIN_DIFFUSERS.format(exports=known, images=str(tmp_path / "x.safetensors"),
                                  out=str(tmp_path / "y.safetensors"), root=str(ROOT))  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "y.safetensors")
    for name in FAMILIES:
        vae = awake(name)
        with torch.no_grad():
            expected = vae.decode(vae.encode(images[name]).mode())
        # the Qwen class clamps what it decodes, ours leaves that to the caller
        expected = expected.clamp(-1, 1) if name == "tiny-qwen" else expected
        assert torch.equal(found[name], expected), name
        assert expected.std() > 0.01


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_of_weights_config_and_statistics(exports, name):
    folder = exports[name]
    again, vae = load_vae(str(folder)), awake(name)
    assert all(torch.equal(again.net.state_dict()[k], v) for k, v in vae.net.state_dict().items())
    mean, std = again.latent_stats()
    torch.testing.assert_close(mean, torch.linspace(-1, 1, vae.latent_channels))
    torch.testing.assert_close(std, torch.linspace(0.5, 2, vae.latent_channels))
    config = json.loads((folder / "config.json").read_text())
    if name != "tiny-qwen":
        assert (config["scaling_factor"], config["shift_factor"]) == (1.0, 0.0)
    assert {p.name for p in folder.iterdir()} == {
        *("config.json", "diffusion_pytorch_model.safetensors", DISCRIMINATOR, "README.md")
    }
    PatchGAN(2, 8).load_state_dict(load_file(folder / DISCRIMINATOR))


@pytest.mark.parametrize("name", ["tiny-f8d4", "tiny-qwen"])  # one of each diffusers class
def test_the_usage_example_of_the_card_runs(exports, name, monkeypatch):
    import diffusers

    text = (exports[name] / "README.md").read_text()
    monkeypatch.chdir(exports[name].parent)
    x = digits(32, "test", 2)
    known = {"torch": torch, "x": x.unsqueeze(2) if name == "tiny-qwen" else x}
    known |= {cls: getattr(diffusers, cls) for cls in (type(awake(name).net).__name__,)}
    with torch.no_grad():
        exec(text.split("```python\n")[1].split("```")[0], known)
    assert known["x_hat"].shape == known["x"].shape


@pytest.mark.parametrize("name", ["tiny-f8d4", "tiny-qwen"])  # one of each diffusers class
@pytest.mark.slow
def test_measured_statistics_normalise_held_out_digits(tmp_path, name):
    folder = checkpoint(tmp_path / "run", name, stats=False, disc=False)
    images = open_source("digits", None, 32, "train")
    origin = export_vae(folder, tmp_path / "out", images=images, images_name="digits (train)")
    assert origin.startswith("Measured in float64, ")
    assert "on 1438 images of digits (train) at 32 px, seed 0" in origin
    vae = load_vae(str(tmp_path / "out")).eval()
    mean, std = (v.view(1, -1, 1, 1) for v in vae.latent_stats())
    torch.manual_seed(5)
    with torch.no_grad():
        z = (vae.encode(digits(32, "test", 359)).sample() - mean) / std
    # over all channels; a single one strays by the noise of 359 images
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    assert z.mean((0, 2, 3)).abs().max() < 0.15 and (z.std((0, 2, 3)) - 1).abs().max() < 0.15
    assert not (tmp_path / "out" / DISCRIMINATOR).exists()
    assert origin in (tmp_path / "out/README.md").read_text()


def test_a_weight_file_becomes_a_diffusers_folder(tmp_path):
    vae = awake("tiny-f8d4")
    torch.save({"state_dict": vae.net.state_dict()}, tmp_path / "vae.ckpt")
    images = open_source("digits", None, 16, "test")
    export_vae(tmp_path / "vae.ckpt", tmp_path / "out", images=images, num_images=8)
    again = load_vae(str(tmp_path / "out")).net.state_dict()
    assert all(torch.equal(again[k], v) for k, v in vae.net.state_dict().items())
    assert "name: as-its-origin" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(UserError, match="no latent statistics: measure them with --data"):
        export_vae(tmp_path / "vae.ckpt", tmp_path / "other")


def test_measuring_does_not_depend_on_the_batch(monkeypatch):
    vae, source = awake("tiny-f8d4"), open_source("digits", None, 16)
    mean, std = latent_stats.measure_latents(vae, source, 70, seed=3)
    monkeypatch.setattr(latent_stats, "CHUNK", 7)
    again = latent_stats.measure_latents(vae, source, 70, seed=3)
    assert mean.dtype == torch.float64
    torch.testing.assert_close(mean.float(), again[0].float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(std.float(), again[1].float(), atol=1e-5, rtol=0)
    assert not torch.equal(mean, latent_stats.measure_latents(vae, source, 70, seed=4)[0])


def test_a_run_is_exported_by_its_name_and_nothing_says_where_it_was(tmp_path):
    folder = checkpoint(tmp_path / "run", "tiny-f8d4")
    export_vae(tmp_path / "run", tmp_path / "newest")
    assert "step 1200" in (tmp_path / "newest/README.md").read_text()
    config = folder / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "/home/me"}))
    export_vae(folder / "vae", tmp_path / "out")
    for file in ("README.md", "config.json"):
        text = (tmp_path / "out" / file).read_text()
        assert "/home/me" not in text and str(tmp_path) not in text


def test_a_download_without_the_optimizers_is_exported(tmp_path):
    """Of a repository of the hub only what is needed is here; what is here is still vouched for."""
    folder, copy = checkpoint(tmp_path / "run", "tiny-f8d4"), tmp_path / "copy"

    def with_moments(draft: Path) -> None:
        shutil.copytree(folder, draft, dirs_exist_ok=True)
        (draft / STATE).unlink()
        (draft / "optim.pt").write_text("moments")

    seal_checkpoint(copy, 7, with_moments, {})
    (copy / "optim.pt").unlink()
    export_vae(copy, tmp_path / "out")
    weights = copy / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"vae/diffusion_pytorch_model.safetensors is damaged"):
        export_vae(copy, tmp_path / "other")


def test_an_export_can_be_exported_again(exports, tmp_path):
    export_vae(exports["tiny-f8d4"], tmp_path / "again", title="me/vae")
    text = (tmp_path / "again/README.md").read_text()
    assert "# me/vae\n" in text and "Not recorded" in text
    assert (tmp_path / "again" / DISCRIMINATOR).is_file()


def test_refusals_leave_nothing_behind(tmp_path):
    folder, out = checkpoint(tmp_path / "run", "tiny-f8d4", stats=False), tmp_path / "out"
    images = {"images": open_source("digits", None, 16), "num_images": 32}
    with pytest.raises(UserError, match="no latent statistics: measure them with --data"):
        export_vae(folder, out)
    with pytest.raises(UserError, match="no such folder"):
        export_vae(tmp_path / "absent", out, **images)
    with pytest.raises(UserError, match="resolution 20 is not a multiple"):
        export_vae(folder, out, images=open_source("digits", None, 20))
    with pytest.raises(UserError, match="expected the --out of"):
        export_vae(folder, out, **images, evaluation=tmp_path / "absent.json")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    out.mkdir()
    export_vae(folder, out, **images)  # an empty folder is filled
    with pytest.raises(UserError, match="exists and is not empty"):
        export_vae(folder, out, **images)
    (folder / DISCRIMINATOR).write_bytes(b"damaged")
    with pytest.raises(UserError, match=rf"{DISCRIMINATOR} is damaged"):
        export_vae(folder, tmp_path / "other", **images)


def test_uploading_without_a_network_is_a_line_with_the_remedy(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("offline\nsecond line")

    monkeypatch.setattr(exporting.HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match=r"to me/vae \(ConnectionError: offline.*run `hf upload"):
        upload(tmp_path, "me/vae")


def test_uploading_sends_the_folder_and_says_where_it_is(tmp_path, monkeypatch, capsys):
    calls = []
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(
            exporting.HfApi, name, lambda *a, name=name, **k: calls.append((name, a[1:], k))
        )
    upload(tmp_path, "me/vae")
    assert "https://huggingface.co/me/vae" in capsys.readouterr().out
    assert calls == [
        ("create_repo", ("me/vae",), {"exist_ok": True}),
        ("upload_folder", (), {"folder_path": tmp_path, "repo_id": "me/vae"}),
    ]
