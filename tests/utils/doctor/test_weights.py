"""Weight files: here, to be downloaded, or not to be had; a random discriminator.

python -m pytest tests/utils/doctor/test_weights.py        (nothing asks a network)
"""

import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import constants

from models.vae import build_vae
from models.weights.published import WeightFile
from utils.doctor import weights
from utils.doctor.weights import weight_file_status

HUB_FILE = WeightFile("a.safetensors", repo="me/vae", setting="vae.weights={}")


@pytest.fixture
def online(monkeypatch):
    """Replace the hub's answer for a file: None, or an error that it raises."""

    def answer(error: Exception | None) -> None:
        def ask(url: str, timeout: float) -> None:
            if error:
                raise error

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(weights, "get_hf_file_metadata", ask)

    return answer


def test_a_hub_file_fails_with_the_hubs_own_words_and_the_remedy(online):
    found = weight_file_status(HUB_FILE, "vae")
    assert found.status == "FAIL" and "HF_HUB_OFFLINE is set" in found.text
    online(None)
    found = weight_file_status(HUB_FILE, "vae")
    assert found.status == "ok" and "will be downloaded at the start" in found.text
    online(OSError("403\nits licence must be accepted"))
    found = weight_file_status(HUB_FILE, "vae")
    assert found.status == "FAIL" and "its licence must be accepted" in found.text
    assert "hf download me/vae" in found.text and "vae.weights=" in found.text


def test_another_file_is_asked_for_without_its_content(tmp_path, monkeypatch):
    methods, urlopen = [], urllib.request.urlopen
    monkeypatch.setattr(
        urllib.request,
        "urlopen",
        lambda request, timeout: (methods.append(request.get_method()), urlopen(request))[1],
    )
    address = (tmp_path / "vgg.pth").as_uri()
    found = weight_file_status(WeightFile("vgg.pth", url=address, otherwise="do without"), "lpips")
    assert found.status == "FAIL" and address in found.text and "do without" in found.text
    (tmp_path / "vgg.pth").touch()
    found = weight_file_status(WeightFile("vgg.pth", url=address), "lpips")
    assert (found.status, found.name) == ("ok", "lpips") and "will be downloaded" in found.text
    assert methods == ["HEAD", "HEAD"]


@pytest.mark.slow
def test_published_weights_that_are_not_here_and_those_in_the_caches(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: 1 / 0)
    words = ("vae.name=sdvae", "vae.weights=hub", "encoder.weights=[null]", "loss.reg.lpips=1")
    words += ("encoder.names=[dinov2-s]", "sit.patch_size=1", "encoder.grid=2")
    found = quick(*words)
    assert [found.only(name)[0] for name in ("vae", "encoder", "lpips")] == ["FAIL"] * 3
    assert "hf download stabilityai/sd-vae-ft-mse" in found.only("vae")[1]
    assert "encoder.weights=" in found.only("encoder")[1]
    assert not (tmp_path / "hub").exists()
    vae_files = ("config.json", "diffusion_pytorch_model.safetensors")
    put_into_hub_cache(tmp_path / "hub", "stabilityai/sd-vae-ft-mse", vae_files)
    put_into_hub_cache(
        tmp_path / "hub", "timm/vit_small_patch14_dinov2.lvd142m", ("model.safetensors",)
    )
    vgg = tmp_path / "torch" / "hub" / "checkpoints" / "vgg16-397923af.pth"
    vgg.parent.mkdir(parents=True)
    vgg.touch()
    found = quick(*words)
    assert not found.failed and found.only("lpips") == ("ok", str(vgg))
    assert found.only("vae")[1].endswith("/main/diffusion_pytorch_model.safetensors")


def put_into_hub_cache(cache: Path, repo: str, files: tuple[str, ...]) -> None:
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("main")
    (root / "snapshots" / "main").mkdir(parents=True)
    for file in files:
        (root / "snapshots" / "main" / file).touch()


@pytest.mark.slow
def test_a_random_discriminator_beside_a_pretrained_vae_is_warned_about(quick, tmp_path):
    build_vae("tiny-f2d4").save(tmp_path / "vae")
    pretrained = f"vae.weights={tmp_path / 'vae'}"
    warned = [text for status, text in quick(pretrained)["disc"] if status == "warn"]
    assert len(warned) == 1 and "disc.pretrain_steps" in warned[0]
    for more in ((pretrained, "disc.pretrain_steps=2"), (pretrained, "loss.reg.gan_start=2"), ()):
        assert [status for status, _ in quick(*more)["disc"]] == ["ok"]
