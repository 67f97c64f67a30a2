"""What a published file may hold, and that nothing of a pickle is executed."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

from models.checks.errors import UserError
from tests.published_files import (
    MEAN,
    VAR,
    Bomb,
    compvis_vae,
    joint_checkpoint,
    namespace,
    sit_state,
    stats_file,
)
from utils.published.files import read_discriminator, read_latent_stats, read_published


def test_a_training_checkpoint_is_read_without_wrappers_and_with_plain_settings(tmp_path):
    args = namespace(odd=torch.zeros(2), path=None, nested={"a": 1})
    found = read_published(joint_checkpoint(tmp_path / "c.pt", args=args))
    assert found.step == 400_000 and found.sit is found.ema
    assert found.model.keys() == sit_state(1).keys()
    assert found.vae.keys() == compvis_vae().state_dict().keys()
    assert found.args["cfg_prob"] == 0.1 and found.args["path"] is None
    assert not {"odd", "nested"} & found.args.keys()
    for step in (-1, True, "1", 1.5):
        assert read_published(joint_checkpoint(tmp_path / "c.pt", steps=step)).step == 0


def test_bare_wrapped_and_safetensors_state_dicts_are_told_apart_by_their_tensors(tmp_path):
    torch.save(sit_state(1), tmp_path / "sit.pt")
    torch.save({"state_dict": compvis_vae().state_dict()}, tmp_path / "vae.ckpt")
    save_file(sit_state(1), tmp_path / "sit.safetensors")
    for name, kind in (("sit.pt", "model"), ("vae.ckpt", "vae"), ("sit.safetensors", "model")):
        found = read_published(tmp_path / name)
        held = [k for k in ("model", "ema", "vae", "discriminator") if getattr(found, k)]
        assert held == [kind] and found.args == {} and found.step == 0


def test_both_layouts_of_latent_statistics(tmp_path):
    mean, std = torch.tensor(MEAN), torch.tensor(VAR).sqrt()
    shaped = {"mean": mean.view(1, 4, 1, 1), "std": std.view(1, 4, 1, 1)}
    torch.save(shaped, tmp_path / "lightningdit.pt")
    for path in (stats_file(tmp_path / "repae.pt"), tmp_path / "lightningdit.pt"):
        found = read_latent_stats(path)
        torch.testing.assert_close(found[0], mean)
        torch.testing.assert_close(found[1], std)


@pytest.mark.parametrize("where", ["args", "steps", "vae", "discriminator", "whole", "legacy"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, where):
    bomb, mark = tmp_path / "bomb.pt", tmp_path / "executed"
    if where in ("whole", "legacy"):
        torch.save(Bomb(mark), bomb, _use_new_zipfile_serialization=where == "whole")
    else:
        joint_checkpoint(bomb, **{where: Bomb(mark)})
    for read in (read_published, read_discriminator, read_latent_stats):
        with pytest.raises(UserError, match=r"is refused, .* it asks for \w+\.system"):
            read(bomb)
    assert not mark.exists()
    torch.load(bomb, weights_only=False)
    assert mark.exists()  # the file was a real one


def test_a_namespace_may_hold_no_code_either(tmp_path):
    args = argparse.Namespace(inner=argparse.Namespace(bomb=Bomb(tmp_path / "executed")))
    with pytest.raises(UserError, match="is refused"):
        read_published(joint_checkpoint(tmp_path / "c.pt", args=args))
    assert not (tmp_path / "executed").exists()
    # allowed while a published file is read, and not a moment longer
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_damaged_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_published(tmp_path / "absent.pt")
    whole = joint_checkpoint(tmp_path / "c.pt").read_bytes()
    save_file(sit_state(1), tmp_path / "c.safetensors")
    for name, content in {
        "text.pt": b"hello",
        "empty.pt": b"",
        "half.pt": whole[: len(whole) // 2],
        "last bytes.pt": whole[:-100],
        "half.safetensors": (tmp_path / "c.safetensors").read_bytes()[:5000],
        "text.safetensors": b"hello",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"is refused.*download it again") as error:
            read_published(tmp_path / name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(str(tmp_path))
        assert "text" not in name or "begins with b'hello'" in str(error.value)
    for content, message in (
        ([1, 2], "holds a list"),
        ({}, "holds nothing: expected a training checkpoint"),
        ({"opt": {"a": 1}}, "holds opt: expected"),
        ({"ema": {"a": 3}}, "ema of .* is not a state dict"),
        ({"ema": [torch.zeros(1)]}, "ema of .* is not a state dict"),
    ):
        torch.save(content, tmp_path / "c.pt")
        with pytest.raises(UserError, match=message):
            read_published(tmp_path / "c.pt")


def test_tensors_larger_than_their_file_are_refused(tmp_path):
    """A few bytes could otherwise ask for all memory."""
    for huge in (
        torch.zeros(1).expand(10**6, 10**6),
        torch.empty(10**6, 10**6, device="meta"),
        torch.zeros(2, 2).to_sparse(),
    ):
        torch.save({"ema": sit_state(1) | {"pos_embed": huge}}, tmp_path / "c.pt")
        with pytest.raises(UserError, match=r"tensor pos_embed is .*not stored in full"):
            read_published(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "content",
    [
        {"latents_scale": torch.ones(2), "latents_bias": torch.zeros(3)},
        {"latents_scale": torch.tensor([1.0, float("inf")]), "latents_bias": torch.zeros(2)},
        {"latents_scale": torch.tensor([1.0, 0.0]), "latents_bias": torch.zeros(2)},
        {"mean": torch.tensor([float("nan")]), "std": torch.ones(1)},
        {"mean": torch.zeros(1), "std": -torch.ones(1)},
        {"mean": "0", "std": "1"},
        {"mean": torch.zeros(1)},
    ],
)
def test_statistics_that_cannot_normalise_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "s.pt")
    with pytest.raises(UserError, match=r"expected .*(finite|tensors|latents_scale)"):
        read_latent_stats(tmp_path / "s.pt")
