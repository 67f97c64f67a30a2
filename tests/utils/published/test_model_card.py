"""The model card of an exported VAE."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from models.checks.errors import UserError
from tests.exported_vaes import awake, checkpoint
from utils.checkpoint import STATE
from utils.published.model_card import make_card, read_evaluation, read_run_settings


def evaluation(path: Path, **changes) -> Path:
    record = {"metrics": {"rFID@1000": 1.25, "PSNR": 26.5, "SSIM": 0.75, "LPIPS": 0.125}}
    record |= {"details": {}, "n": 1000, "samples": {"name": "digits"}}
    record |= {"features": {"label": "inception"}, "vae": {"spec": "exps/x/vae", "weights": "hub"}}
    record |= {"not_comparable_because": ["1000 images, not 50000"]}
    path.write_text(json.dumps(record | changes))
    return path


def card(state: dict, settings: dict, record: dict | None = None, name="tiny-f8d4") -> str:
    vae = awake(name)
    channels = vae.latent_channels
    mean, std = torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels)
    return make_card("my-vae", vae, (mean, std, "Measured on 5 images"), state, settings, record)


def test_the_card_of_a_run(tmp_path):
    folder = checkpoint(tmp_path / "run", "tiny-f8d4")
    state = json.loads((folder / STATE).read_text())
    record = read_evaluation(evaluation(tmp_path / "e.json"))
    text = card(state, read_run_settings(folder, state), record)
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "diffusers" and "repa-e" in front["tags"]
    assert front["base_model"] == "stabilityai/sd-vae-ft-mse"
    for words in (
        "# my-vae",
        "step 1200",
        "(N, 3, H, W), sides a multiple of 8",
        "| global batch | 256 |",
        "| learning rate of the VAE | 2e-05 |",
        "| aligned encoders | dinov2-b |",
        "| reconstruction loss | pixel 0.5, pixel_kind l1,",
        "| torch of the run |",
        "| rFID-1k | 1.2500 |",
        "| PSNR-1k | 26.5000 |",
        "| SSIM-1k | 0.7500 |",
        "| LPIPS-1k | 0.1250 |",
        "Not comparable with published numbers: 1000 images",
        "Measured on 5 images.",
        "| 0 | -1.000000 | 0.500000 |",
        "SD3 and FLUX ignore",
        "(1 and 0 here)",
        "torch 2",
    ):
        assert words in body, words
    assert "/home/me" not in text and "$" not in text
    example = body.split("```python\n")[1].split("```")[0]
    assert len(example.splitlines()) == 3


ORIGINS = {  # settings of a run: licence, whether a base model is named
    "vae.name=sdvae vae.weights=hub": ("as-starting-vae", True),
    "vae.name=sdvae vae.weights=/home/me/vae": ("as-starting-vae", True),
    "vae.name=sdvae": ("mit", False),
    "vae.name=tiny-f8d4 vae.weights=hub": ("mit", False),
    "vae.name=tiny-f8d4 run.init_from=/home/me/a": ("as-its-origin", False),
    "vae.name=/home/me/vae vae.weights=hub": ("as-its-origin", False),
}


@pytest.mark.parametrize("words", ORIGINS)
def test_the_licence_is_that_of_what_the_vae_goes_back_to(words):
    """Of a VAE from random weights, no starting VAE is claimed; no folder of a machine is told."""
    settings = dict(word.split("=") for word in words.split())
    text = card({"step": 4}, settings | {"loss.reg": {"net": "resnet18@/home/me/judge.pt"}})
    front = yaml.safe_load(text.split("---\n", 2)[1])
    licence, has_base = ORIGINS[words]
    assert front.get("license_name", front["license"]) == licence
    assert ("base_model" in front) == has_base == ("starting VAE" in text)
    assert "/home/me" not in text and "net resnet18@judge.pt" in text


def test_the_numbers_of_a_card_name_no_folder(tmp_path):
    record = {"samples": {"name": "folder:/home/me/val@256, 9 of 10 evenly spaced"}, "n": 9}
    record |= {"vae": {"spec": "exps/me/checkpoints/0400000"}, "metrics": {"SSIM": -0.00001}}
    record |= {"features": {"label": "timm:vit/16@/home/me/vit.pt"}}
    record = read_evaluation(evaluation(tmp_path / "e.json", **record))
    text = card({}, {}, record)
    assert "folder:val@256" in text and "as `0400000`" in text and "timm:vit/16@vit.pt" in text
    assert "| SSIM-9 | 0.0000 |" in text and "/home/me" not in text


def test_a_config_that_cannot_be_read_is_left_out_with_a_word(tmp_path, capsys):
    folder = checkpoint(tmp_path / "run", "tiny-f8d4")
    (tmp_path / "run/config.yaml").write_text("of: another program\n")
    assert read_run_settings(folder, {"step": 1200}) == {}
    assert "config.yaml is left out of the model card: " in capsys.readouterr().out


def test_the_card_says_what_is_not_known(tmp_path):
    text = card({}, {}, name="tiny-qwen")
    assert "Not evaluated." in text and "Not recorded" in text and "base_model" not in text
    assert "(N, 3, 1, H, W): one frame" in text and "(1 and 0 here)" not in text


def test_the_card_of_imported_weights_names_the_published_file(tmp_path):
    (tmp_path / "config.yaml").write_text("not: ours\n")  # nobody's run
    folder = tmp_path / "published/0400000"
    folder.mkdir(parents=True)
    state = {"step": 400_000, "imported": True, "versions": {"torch": "2.14.1"}}
    state["source"] = {"file": "0400000.pt", "sha256": "abc"}
    assert read_run_settings(folder, state) == {}
    text = card(state, {})
    assert "step 400000 (imported from published weights)" in text
    assert "| published file | 0400000.pt |\n| its sha256 | abc |" in text
    assert "| torch of the import | 2.14.1 |" in text  # what it was trained with is not known


@pytest.mark.parametrize("content", ["{}", "no json", json.dumps({"vae": 1}), "[]"])
def test_what_is_no_record_of_a_vae_is_refused(tmp_path, content):
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(UserError, match="expected the --out of"):
        read_evaluation(tmp_path / "e.json")
