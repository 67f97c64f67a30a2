"""VAEs out: what plain diffusers reads, statistics that normalise, the card, refusals.

python -m pytest tests/scripts/test_export_vae.py        (CPU, no network)
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from models.discriminator import PatchGAN
from models.errors import UserError
from models.vae import VAE, build_vae, load_vae
from scripts import export_vae
from utils import latent_stats
from utils.checkpoint import Checkpoints
from utils.data import open_source
from utils.images import u8_to_pm1

FAMILIES = ["tiny-f8d4", "tiny-f16d32", "tiny-qwen"]
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


def awake(name: str) -> VAE:
    torch.manual_seed(0)
    vae = build_vae(name).eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return vae


def checkpoint(run: Path, name: str, stats=True, disc=True) -> Path:
    """A sealed checkpoint with what export reads, inside a run with a config.yaml."""
    vae, channels = awake(name), awake(name).latent_channels

    def fill(folder):
        both = (torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels)) if stats else ()
        vae.save(folder / "vae", *both)
        if disc:
            save_file(PatchGAN(2, 8).state_dict(), folder / "discriminator.safetensors")

    run.mkdir(exist_ok=True)
    config = {"vae": {"name": "sdvae", "weights": "/home/me/vae", "optim": {"lr": 2e-5}}}
    config |= {"encoder": {"names": ["dinov2-b"]}, "run": {"batch_size": 256}}
    config |= {"loss": {"reg": {"l1": 1.0, "lpips_weights": "/home/me/vgg"}}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return Checkpoints(run).save(1200, fill, {"seed": 0})


def run(*words) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export_vae.py", *map(str, words)])
        export_vae.main()


def digits(side: int, split: str, num: int) -> torch.Tensor:
    source = open_source("digits", None, side, split)
    return u8_to_pm1(torch.stack([source[i][0] for i in range(num)]))


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for name in FAMILIES:
        run(checkpoint(root / f"run-{name}", name), root / name)
    return {name: root / name for name in FAMILIES}


def test_plain_diffusers_in_a_fresh_process_reconstructs_bit_for_bit(exports, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = {name: digits(32, "test", 6) for name in FAMILIES}
    save_file(images, tmp_path / "x.safetensors")
    known = [(n, type(awake(n).net).__name__, str(exports[n])) for n in FAMILIES]
    root = Path(export_vae.__file__).resolve().parents[1]
    code = PLAIN_DIFFUSERS.format(exports=known, images=str(tmp_path / "x.safetensors"),
                                  out=str(tmp_path / "y.safetensors"), root=str(root))  # fmt: skip
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
        expected = expected.clamp(-1, 1) if vae.has_frames else expected
        assert torch.equal(found[name], expected), name
        assert expected.std() > 0.01
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_of_weights_config_and_statistics(exports, name):
    folder = exports[name]
    again, vae = load_vae(str(folder)), awake(name)
    assert all(torch.equal(again.net.state_dict()[k], v) for k, v in vae.net.state_dict().items())
    mean, std = again.latent_stats()
    torch.testing.assert_close(mean, torch.linspace(-1, 1, vae.latent_channels))
    torch.testing.assert_close(std, torch.linspace(0.5, 2, vae.latent_channels))
    config = json.loads((folder / "config.json").read_text())
    if not vae.has_frames:
        assert (config["scaling_factor"], config["shift_factor"]) == (1.0, 0.0)
    assert {p.name for p in folder.iterdir()} == {
        *("config.json", "diffusion_pytorch_model.safetensors"),
        *("discriminator.safetensors", "README.md"),
    }
    disc = PatchGAN(2, 8)
    disc.load_state_dict(load_file(folder / "discriminator.safetensors"))


@pytest.mark.parametrize("name", FAMILIES)
def test_measured_statistics_normalise_held_out_digits(tmp_path, name):
    words = ["--data", "digits", "--resolution", 32, "--split", "train"]
    run(checkpoint(tmp_path / "run", name, stats=False, disc=False), tmp_path / "out", *words)
    vae = load_vae(str(tmp_path / "out")).eval()
    mean, std = (v.view(1, -1, 1, 1) for v in vae.latent_stats())
    torch.manual_seed(5)
    with torch.no_grad():
        z = (vae.encode(digits(32, "test", 359)).sample() - mean) / std
    # over all channels; a single one strays by the noise of 359 images
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    assert z.mean((0, 2, 3)).abs().max() < 0.15 and (z.std((0, 2, 3)) - 1).abs().max() < 0.15
    assert not (tmp_path / "out/discriminator.safetensors").exists()
    card = (tmp_path / "out/README.md").read_text()
    assert "Measured in float64, posterior samples in expectation" in card
    assert "on 1438 images of digits (train split)" in card


def test_measuring_does_not_depend_on_the_batch(monkeypatch):
    vae, source = awake("tiny-f8d4"), open_source("digits", None, 16)
    mean, std = latent_stats.measure_latents(vae, source, 70, seed=3)
    monkeypatch.setattr(latent_stats, "CHUNK", 7)
    again = latent_stats.measure_latents(vae, source, 70, seed=3)
    assert mean.dtype == torch.float64
    torch.testing.assert_close(mean.float(), again[0].float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(std.float(), again[1].float(), atol=1e-5, rtol=0)
    assert not torch.equal(mean, latent_stats.measure_latents(vae, source, 70, seed=4)[0])


def evaluation(path: Path, **changes) -> Path:
    record = {"metrics": {"rFID@1000": 1.25, "PSNR": 26.5, "SSIM": 0.75, "LPIPS": 0.125}}
    record |= {"details": {}, "n": 1000, "samples": {"name": "digits"}}
    record |= {"features": {"label": "inception"}, "vae": {"spec": "exps/x/vae", "weights": "hub"}}
    record |= {"not_comparable_because": ["1000 images, not 50000"]}
    path.write_text(json.dumps(record | changes))
    return path


def test_the_card(tmp_path):
    out = tmp_path / "my-vae"
    words = ["--evaluation", evaluation(tmp_path / "e.json")]
    run(checkpoint(tmp_path / "run", "tiny-f8d4"), out, *words)
    text = (out / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "diffusers" and "repa-e" in front["tags"]
    assert front["base_model"] == "stabilityai/sd-vae-ft-mse"
    for words in (
        "# my-vae",
        "step 1200",
        "| global batch | 256 |",
        "| learning rate of the VAE | 2e-05 |",
        "| aligned encoders | dinov2-b |",
        "| reconstruction loss | l1 1.0 |",
        "| torch of the run |",
        "| rFID-1k | 1.2500 |",
        "| PSNR-1k | 26.5000 |",
        "| SSIM-1k | 0.7500 |",
        "| LPIPS-1k | 0.1250 |",
        "Not comparable with published numbers: 1000 images",
        "| 0 | -1.000000 | 0.500000 |",
        "SD3 and FLUX ignore",
        "torch 2",
    ):
        assert words in body, words
    assert "/home/me" not in text and "$" not in text
    example = body.split("```python\n")[1].split("```")[0]
    assert len(example.splitlines()) == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_the_usage_example_runs(exports, name, monkeypatch):
    import diffusers

    text = (exports[name] / "README.md").read_text()
    monkeypatch.chdir(exports[name].parent)
    x = digits(32, "test", 2)
    known = {"torch": torch, "x": x.unsqueeze(2) if name == "tiny-qwen" else x}
    known |= {cls: getattr(diffusers, cls) for cls in (type(awake(name).net).__name__,)}
    with torch.no_grad():
        exec(text.split("```python\n")[1].split("```")[0], known)
    assert known["x_hat"].shape == known["x"].shape


def test_refusals(tmp_path):
    folder, out = checkpoint(tmp_path / "run", "tiny-f8d4", stats=False), tmp_path / "out"
    with pytest.raises(UserError, match="no latent statistics: measure them by --data"):
        run(folder, out)
    with pytest.raises(UserError, match="no such folder"):
        run(tmp_path / "absent", out, "--data", "digits")
    with pytest.raises(UserError, match="resolution 20 is not a multiple"):
        run(folder, out, "--data", "digits", "--resolution", 20)
    with pytest.raises(UserError, match=r"--num: .0.: expected a whole number of 1 or more"):
        run(folder, out, "--num", 0)
    for content in ("{}", "no json", json.dumps({"vae": 1})):
        (tmp_path / "e.json").write_text(content)
        with pytest.raises(UserError, match="expected the --out of"):
            run(folder, out, "--evaluation", tmp_path / "e.json")
    assert not out.exists() and not list(tmp_path.glob(".tmp*"))
    out.mkdir()
    words = ["--data", "digits", "--resolution", 16, "--num", 32]
    run(folder, out, *words)  # an empty folder is filled
    with pytest.raises(UserError, match="exists and is not empty"):
        run(folder, out, *words)
    (folder / "discriminator.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"discriminator\.safetensors is damaged"):
        run(folder, tmp_path / "other", *words)


def test_an_export_can_be_exported_again(exports, tmp_path):
    run(exports["tiny-f8d4"], tmp_path / "again")
    assert "Not recorded" in (tmp_path / "again/README.md").read_text()


def test_pushing_without_a_network_is_one_line_and_keeps_the_folder(exports, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("offline\nsecond line")

    monkeypatch.setattr(export_vae.HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match=r"not uploaded to me/vae \(ConnectionError: offline\)"):
        run(exports["tiny-f8d4"], tmp_path / "out", "--push-to-hub", "me/vae")
    assert "# me/vae" in (tmp_path / "out/README.md").read_text()


def test_pushing_uploads_the_folder(exports, tmp_path, monkeypatch):
    calls = []
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(
            export_vae.HfApi, name, lambda *a, name=name, **k: calls.append((name, a[1:], k))
        )
    run(exports["tiny-f8d4"], tmp_path / "out", "--push-to-hub", "me/vae")
    assert calls == [
        ("create_repo", ("me/vae",), {"exist_ok": True}),
        ("upload_folder", (), {"folder_path": tmp_path / "out", "repo_id": "me/vae"}),
    ]
