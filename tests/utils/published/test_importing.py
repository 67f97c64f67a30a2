"""Published files as checkpoint directories: what is found, what is kept, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checks.errors import UserError
from models.sit import load_sit
from models.vae import build_vae, load_vae
from models.weights.configs import WEIGHTS
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
    first_release,
    joint_checkpoint,
    namespace,
    original_sit_state,
    sit_state,
    stats_file,
)
from utils.checkpoint import DISCRIMINATOR, SIT, SIT_EMA, STATE, VAE_FOLDER, find_fault
from utils.published.importing import import_published
from utils.published.sit_conventions import without_variance
from utils.sampling.load import open_checkpoint
from utils.sampling.settings import SamplingSettings
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
    state = import_published(path, tmp_path / "out", scaling_factor=0.5)
    said = state["source"]["latent_norm"]
    assert said == "bn.* of the checkpoint (--scaling-factor 0.5 is not needed)"
    for name in (SIT, SIT_EMA):
        found = load_sit(tmp_path / "out" / name).state_dict()
        assert torch.equal(found["pos_embed"], sit_state(seed)["pos_embed"])
    assert "used as raw and as EMA" in state["source"]["weights"]


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


OPTIONS = {"vae": "tiny-f8d4", "num_heads": HEADS, "scaling_factor": 0.5}


def test_time_is_converted_where_that_is_proven_or_asked_for(tmp_path):
    """An EMA without projectors was once taken for the original SiT, and silently converted."""
    torch.save(original_sit_state(5), tmp_path / "ema.pt")
    known = original_sit_state(5)["final_layer.linear.weight"]
    with pytest.raises(UserError, match="nothing in the file shows it: give --time repa or --time"):
        import_published(tmp_path / "ema.pt", tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
    settings = {"ema": original_sit_state(5), "args": {"path_type": "Linear"}}
    torch.save(settings, tmp_path / "args.pt")
    for file, time, sign in (("ema", "sit", -1), ("ema", "repa", 1), ("args", "auto", -1)):
        out = tmp_path / f"{file}-{time}"
        state = import_published(tmp_path / f"{file}.pt", out, time=time, **OPTIONS)
        sit = load_sit(out / SIT_EMA)
        assert torch.equal(sit.state_dict()["final_layer.linear.weight"], sign * known)
        assert ("converted" in state["source"]["time"]) == (sign == -1)
        said = "Linear" if file == "args" else "linear, assumed: the file names none"
        assert state["source"]["interpolant"] == said
    assert sit.bn.running_var.tolist() == [4.0] * 4 and sit.config.latent_norm == "fixed"


def test_the_first_release_of_repa_is_the_same_network(tmp_path):
    torch.save({"ema": first_release(sit_state(2))}, tmp_path / "last.pt")
    import_published(tmp_path / "last.pt", tmp_path / "out", vae="tiny-f8d4", num_heads=HEADS)
    sit = load_sit(tmp_path / "out" / SIT_EMA)
    known = sit_state(2)
    assert sit.config.align_depth == 2 and sit.config.depth == DEPTH
    assert all(torch.equal(value, known[name]) for name, value in sit.state_dict().items())


def test_irepas_projectors_come_along_and_others_are_left_out(tmp_path):
    weights, biases = {True: torch.ones(16, 48, 3, 3), False: torch.ones(16, 48)}, torch.ones(16)
    for kept, weight in weights.items():
        head = "projectors.0.projection_layer."
        head = {f"{head}weight": weight, f"{head}bias": biases}
        torch.save({"ema": original_sit_state(2) | head}, tmp_path / "c.pt")
        state = import_published(tmp_path / "c.pt", tmp_path / str(kept), **OPTIONS)
        sit = load_sit(tmp_path / str(kept) / SIT_EMA)
        assert [tuple(p.weight.shape) for p in sit.projectors] == [(16, 48, 3, 3)] * kept
        assert state["source"]["projectors"] == 1 or "left out" in state["source"]["projectors"]
        assert "projectors" in state["source"]["time"]


def test_a_variance_head_is_refused_or_dropped(tmp_path):
    state = original_sit_state(6, out=8)
    torch.save({"model": state, "ema": state}, tmp_path / "SiT.pt")
    options = {"vae": "tiny-f8d4", "num_heads": HEADS}
    with pytest.raises(UserError, match=r"learn_sigma head .*--allow-learn-sigma slice"):
        import_published(tmp_path / "SiT.pt", tmp_path / "out", **options)
    options["allow_learn_sigma"] = True
    with pytest.raises(UserError, match=r"no latent norm, .*--stats .*--scaling-factor"):
        import_published(tmp_path / "SiT.pt", tmp_path / "out", **options)
    found = import_published(tmp_path / "SiT.pt", tmp_path / "out", scaling_factor=0.5, **options)
    assert found["source"]["latent_norm"] == "--scaling-factor 0.5"
    assert "the name SiT with a variance head" in found["source"]["time"]
    for name in (SIT, SIT_EMA):
        weight = load_sit(tmp_path / "out" / name).final_layer.linear.weight
        assert len(weight) == PATCH * PATCH * 4


def test_a_dit_can_start_a_run_but_is_never_sampled(tmp_path):
    path = tmp_path / "DiT-XL-2-256x256.pt"
    torch.save(original_sit_state(6, out=8), path)
    with pytest.raises(UserError, match=r"is a DiT by its name: it predicts noise, not velocity"):
        import_published(path, tmp_path / "out", **OPTIONS)
    state = import_published(path, tmp_path / "out", allow_learn_sigma="slice", **OPTIONS)
    assert state["source"]["predicts"] == "noise" and "999" in state["source"]["time"]
    known = without_variance(original_sit_state(6, out=8))["final_layer.linear.weight"]
    assert torch.equal(load_sit(tmp_path / "out" / SIT).final_layer.linear.weight, known)
    with pytest.raises(UserError, match="imported from a DiT, which predicts noise"):
        open_checkpoint(tmp_path / "out", SamplingSettings())


def test_a_pipeline_of_diffusers_brings_its_vae(tmp_path):
    """As SiTTransformer2DModel is stored: SiT's own names, in transformer/."""
    folder = tmp_path / "SiT-pipeline"
    (folder / "transformer").mkdir(parents=True)
    save_file(original_sit_state(6, out=8), folder / "transformer" / WEIGHTS)
    config = {"_class_name": "SiTTransformer2DModel", "num_heads": HEADS, "learn_sigma": True}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    build_vae("tiny-f8d4").save(folder / "vae")
    options = {"allow_learn_sigma": True, "scaling_factor": 0.5}
    state = import_published(folder, tmp_path / "out", **options)
    assert state["source"]["vae"] == str(folder / "vae") and state["source"]["file"] == folder.name
    assert "converted" in state["source"]["time"]


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
    # without them, the scale of its latents could be that of several published VAEs
    (tmp_path / "e2e-latents-stats.pt").unlink()
    with pytest.raises(UserError, match=r"--scaling-factor \(0.18215 .* 0.13025 for SDXL"):
        import_published(tmp_path / "e2e.pt", tmp_path / "c")
    import_published(tmp_path / "e2e.pt", tmp_path / "c", scaling_factor=0.5)
    assert load_vae(str(tmp_path / "c")).latent_stats()[1].tolist() == [2.0] * 4


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
        with pytest.raises(UserError, match=r"bomb\.pt"):
            import_published(tmp_path / file, tmp_path / "out", time="repa", **options)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def edited(change) -> dict:
    state = sit_state(2)
    change(state)
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": lambda s: s.pop("blocks.1.mlp.fc2.bias")}, r"1 missing \(blocks.1.mlp.fc2.bias\)"),
        ({"ema": lambda s: s.update(z=s["pos_embed"])}, "no SiT here has tensors z; if"),
        ({"model": lambda s: s.update({"blocks.0.norm1.weight": s["pos_embed"]})},
         r"has tensors blocks\.0\.norm1"),
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
    torch.save(original_sit_state(5), sit := tmp_path / "sit.pt")
    with pytest.raises(UserError, match=r"sit\.pt.* encoder\.conv_in\.weight"):
        import_published(sit, tmp_path / "out", vae=str(sit), time="repa")
    assert not (tmp_path / "out").exists()
