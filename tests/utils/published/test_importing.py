"""Published files as checkpoint directories: what is found, what is kept, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.checks.errors import UserError
from models.sit import load_sit
from models.vae import load_vae
from tests.published_files import (
    CLASSES,
    DEPTH,
    HEADS,
    MEAN,
    PATCH,
    SIDE,
    VAR,
    Bomb,
    compvis_vae,
    disc_state,
    joint_checkpoint,
    namespace,
    original_sit_state,
    sit_state,
    stats_file,
)
from utils.checkpoint import DISCRIMINATOR, SIT, SIT_EMA, STATE, VAE_FOLDER, find_fault
from utils.published.importing import import_published
from utils.sealed import MODEL_INDEX


def state_of(out: Path) -> dict:
    assert find_fault(out) is None
    return json.loads((out / STATE).read_text())


@pytest.fixture(scope="module")
def joint(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("joint")
    path = joint_checkpoint(folder / "0400000.pt")
    import_published(path, folder / "out")
    return path, folder / "out"


def test_a_training_checkpoint_is_a_whole_checkpoint_of_ours(joint):
    state = state_of(joint[1])
    assert state["step"] == 400_000 and state["imported"] is True and state["path"] == "linear"
    assert len(state["source"]["sha256"]) == 64 and state["optimizer_state"] is None
    assert state["source"]["args"]["enc_type"] == "dinov2-vit-b"
    names = {p.name for p in joint[1].iterdir()}
    assert names == {VAE_FOLDER, SIT, SIT_EMA, DISCRIMINATOR, STATE, MODEL_INDEX}
    disc = load_file(joint[1] / DISCRIMINATOR)
    assert disc.keys() == disc_state().keys() and disc["main.9.running_var"].shape == (64,)
    assert not list(joint[1].parent.glob(".t*"))


def test_ema_and_raw_weights_pos_embed_and_statistics_are_kept_apart(joint):
    for name, seed in ((SIT, 1), (SIT_EMA, 2)):
        known, sit = sit_state(seed), load_sit(joint[1] / name)
        found = sit.state_dict()
        assert found.keys() == known.keys()
        assert all(torch.equal(found[k], known[k]) for k in known)
    c = sit.config
    assert (c.num_heads, c.depth, c.patch_size, c.input_size) == (HEADS, DEPTH, PATCH, SIDE)
    assert (c.align_depth, c.projector_dim, tuple(c.encoder_dims)) == (2, 24, (16,))
    assert (c.num_classes, c.class_dropout_prob, c.latent_norm) == (CLASSES, 0.1, "batch")
    mean, std = load_vae(str(joint[1])).latent_stats()
    torch.testing.assert_close(mean, torch.tensor(MEAN))
    torch.testing.assert_close(std, (torch.tensor(VAR) * 1.2 + 1e-4).sqrt())


@pytest.mark.parametrize(("kept", "seed"), [("model", 1), ("ema", 2)])
def test_one_set_of_weights_is_both(tmp_path, kept, seed):
    left_out = {"model": "ema", "ema": "model"}[kept]
    path = joint_checkpoint(tmp_path / "c.pt", **{left_out: None})
    state = import_published(path, tmp_path / "out")
    for name in (SIT, SIT_EMA):
        found = load_sit(tmp_path / "out" / name).state_dict()
        assert torch.equal(found["pos_embed"], sit_state(seed)["pos_embed"])
    assert "both" in state["source"]["weights"]


@pytest.mark.slow
def test_a_checkpoint_without_its_vae_finds_the_one_it_names_beside_it(tmp_path):
    torch.save(compvis_vae().state_dict(), tmp_path / "e2e.pt")
    args = namespace(vae_ckpt="/nowhere/pretrained/e2e.pt", path_type="cosine")
    path = joint_checkpoint(tmp_path / "c.pt", vae=None, discriminator=None, args=args)
    import_published(path, tmp_path / "out")
    assert state_of(tmp_path / "out")["path"] == "cosine"
    assert load_sit(tmp_path / "out" / SIT).config.latent_norm == "fixed"
    decoder = load_vae(str(tmp_path / "out")).net.state_dict()["decoder.conv_in.weight"]
    assert torch.equal(decoder, compvis_vae().decoder.conv_in.weight)
    (tmp_path / "e2e.pt").rename(tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"names the VAE ./nowhere/.*give --vae"):
        import_published(path, tmp_path / "again")
    import_published(path, tmp_path / "again", vae=str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match="decodes 16: give its own"):
        import_published(path, tmp_path / "third", vae="tiny-f8d16")
    # a name that is no file must not be looked for on the hub
    path = joint_checkpoint(
        tmp_path / "c.pt", vae=None, args=namespace(vae_ckpt="REPA-E/e2e-vavae")
    )
    with pytest.raises(UserError, match="neither there nor beside"):
        import_published(path, tmp_path / "third")
    path = joint_checkpoint(tmp_path / "c.pt", vae=None)
    with pytest.raises(UserError, match="names none: give --vae"):
        import_published(path, tmp_path / "third")


def test_time_is_converted_only_for_the_original_sit_or_when_asked_for(tmp_path):
    torch.save(original_sit_state(5), tmp_path / "sit.pt")
    known = original_sit_state(5)["final_layer.linear.weight"]
    for time, sign in (("auto", -1), ("sit", -1), ("repa", 1)):
        state = import_published(
            tmp_path / "sit.pt", tmp_path / time, vae="tiny-f8d4", scaling_factor=0.5,
            num_heads=HEADS, time=time,
        )  # fmt: skip
        sit = load_sit(tmp_path / time / SIT_EMA)
        assert torch.equal(sit.state_dict()["final_layer.linear.weight"], sign * known)
        assert ("converted" in state["source"]["time"]) == (sign == -1)
    assert sit.bn.running_var.tolist() == [4.0] * 4 and sit.config.latent_norm == "fixed"


def test_a_variance_head_is_refused_or_dropped(tmp_path):
    state = original_sit_state(6, out=8)
    torch.save({"model": state, "ema": state, "args": namespace()}, tmp_path / "SiT.pt")
    options = {"vae": "tiny-f8d4", "num_heads": HEADS}
    with pytest.raises(UserError, match=r"learn_sigma head .*--allow-learn-sigma slice"):
        import_published(tmp_path / "SiT.pt", tmp_path / "out", **options)
    options["allow_learn_sigma"] = True
    with pytest.raises(UserError, match=r"no latent norm, .*--stats .*--scaling-factor"):
        import_published(tmp_path / "SiT.pt", tmp_path / "out", **options)
    found = import_published(tmp_path / "SiT.pt", tmp_path / "out", scaling_factor=0.5, **options)
    assert found["source"]["latent_norm"] == "--scaling-factor 0.5"
    for name in (SIT, SIT_EMA):
        weight = load_sit(tmp_path / "out" / name).final_layer.linear.weight
        assert len(weight) == PATCH * PATCH * 4


@pytest.mark.slow
def test_a_vae_alone_with_the_statistics_beside_it_and_its_discriminator(tmp_path):
    torch.save(compvis_vae().state_dict(), tmp_path / "e2e.pt")
    stats_file(tmp_path / "e2e-latents-stats.pt")
    torch.save({"state_dict": disc_state()}, tmp_path / "d.pt")
    import_published(tmp_path / "e2e.pt", tmp_path / "out", discriminator=tmp_path / "d.pt")
    state = state_of(tmp_path / "out")
    assert state["source"]["latent_norm"].endswith("e2e-latents-stats.pt") and "path" not in state
    assert {p.name for p in (tmp_path / "out").iterdir()} == {VAE_FOLDER, DISCRIMINATOR, STATE}
    vae = load_vae(str(tmp_path / "out"))
    torch.testing.assert_close(vae.latent_stats()[1], torch.tensor(VAR).sqrt())
    # other statistics can be given, and none need be known
    stats_file(tmp_path / "s.pt", mean=(1.0,) * 4)
    import_published(tmp_path / "e2e.pt", tmp_path / "b", stats=tmp_path / "s.pt")
    assert load_vae(str(tmp_path / "b")).latent_stats()[0].tolist() == [1.0] * 4
    (tmp_path / "e2e-latents-stats.pt").unlink()
    state = import_published(tmp_path / "e2e.pt", tmp_path / "c")
    assert state["source"]["latent_norm"] == "none"
    assert load_vae(str(tmp_path / "c")).latent_stats() is None


def test_malicious_files_beside_the_first_are_refused_too(tmp_path):
    torch.save(compvis_vae().state_dict(), tmp_path / "vae.pt")
    torch.save(original_sit_state(5), tmp_path / "sit.pt")
    bomb = tmp_path / "bomb.pt"
    torch.save({"latents_scale": Bomb(tmp_path / "executed")}, bomb)
    for file, options in (
        ("vae.pt", {"stats": bomb}),
        ("vae.pt", {"discriminator": bomb}),
        ("sit.pt", {"vae": str(bomb)}),
    ):
        with pytest.raises(UserError, match="is refused"):
            import_published(tmp_path / file, tmp_path / "out", **options)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def edited(change) -> dict:
    state = sit_state(2)
    change(state)
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": lambda s: s.pop("blocks.1.mlp.fc2.bias")}, r"1 missing \(blocks.1.mlp.fc2.bias\)"),
        ({"ema": lambda s: s.update(z=s["pos_embed"])}, r"1 unexpected \(z\)"),
        ({"model": lambda s: s.pop("pos_embed")}, r"model of .*1 missing \(pos_embed\)"),
        ({"ema": lambda s: s.pop("bn.running_var")}, r"1 missing \(bn.running_var\)"),
        ({"ema": lambda s: s.update(pos_embed=s["pos_embed"].repeat(1, 4, 1))},
         r"1 of another shape \(pos_embed \(1, 4, 48\) for \(1, 16, 48\)\)"),
        ({"args": namespace(num_classes=1000)}, "6 label rows do not fit"),
        ({"args": namespace(path_type="VP")}, "path_type=VP"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_left_behind(tmp_path, changes, message):
    changes = {k: edited(v) if callable(v) else v for k, v in changes.items()}
    path = joint_checkpoint(tmp_path / "c.pt", **changes)
    with pytest.raises(UserError, match=message):
        import_published(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_options_that_cannot_be_are_refused(joint, tmp_path):
    path, out = joint
    for folder, options, message in (
        (out, {}, "exists and is not empty"),
        (tmp_path / "out", {"vae": "tiny-f8d4"}, "holds its VAE: leave out --vae"),
        (tmp_path / "out", {"discriminator": path}, "leave out --discriminator"),
    ):
        with pytest.raises(UserError, match=message):
            import_published(path, folder, **options)
    torch.save(compvis_vae().state_dict(), tmp_path / "vae.pt")
    stats = stats_file(tmp_path / "s.pt", mean=(0.0, 1.0), var=(1.0, 1.0))
    with pytest.raises(UserError, match="is of 2 channels, the VAE has 4"):
        import_published(tmp_path / "vae.pt", tmp_path / "out", stats=stats)
    torch.save(original_sit_state(5), tmp_path / "sit.pt")
    with pytest.raises(UserError, match="holds no VAE: expected encoder"):
        import_published(tmp_path / "sit.pt", tmp_path / "out", vae=str(tmp_path / "sit.pt"))
    assert not (tmp_path / "out").exists()
