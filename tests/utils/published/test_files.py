"""What a published file may hold, and that nothing of a pickle is executed."""

import re
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from models.checks.errors import UserError
from tests.published_files import (
    MEAN,
    VAR,
    Bomb,
    compvis_vae,
    disc_state,
    joint_checkpoint,
    namespace,
    sit_state,
    stats_file,
)
from utils.published.files import read_discriminator, read_latent_stats, read_published


def test_a_training_checkpoint_is_read_without_wrappers_and_with_plain_settings(tmp_path):
    args = namespace(odd=torch.zeros(2), path=None, nested={"a": 1, "cfg_prob": 9})
    found = read_published(joint_checkpoint(tmp_path / "c.pt", args=args))
    assert found.step == 400_000 and found.sit is found.ema and found.has_vae
    assert found.model.keys() == sit_state(1).keys()
    assert found.discriminator.keys() == disc_state().keys()
    assert found.where["model"] == "model, without the prefix module."
    assert found.args["cfg_prob"] == 0.1 and found.args["path"] is None and found.args["a"] == 1
    assert "odd" not in found.args
    for step in (-1, True, "1", 1.5):
        assert read_published(joint_checkpoint(tmp_path / "c.pt", steps=step)).step == 0


def test_bare_wrapped_and_safetensors_state_dicts_are_told_apart_by_their_tensors(tmp_path):
    torch.save(sit_state(1), tmp_path / "sit.pt")
    torch.save({"state_dict": compvis_vae().state_dict()}, tmp_path / "vae.ckpt")
    save_file(sit_state(1), tmp_path / "sit.safetensors")
    for name, sit in (("sit.pt", True), ("vae.ckpt", False), ("sit.safetensors", True)):
        found = read_published(tmp_path / name)
        assert (found.model is not None, found.has_vae) == (sit, not sit)
        assert found.ema is None and found.args == {} and found.step == 0


def prefixed(state: dict, prefix: str) -> dict:
    return {f"{prefix}{key}": value for key, value in state.items()}


def compiled(state: dict) -> dict:
    """As when each block was compiled, then all of it wrapped for DDP."""
    inner = {re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", key): v for key, v in state.items()}
    return prefixed(inner, "module.")


RAW, EMA = sit_state(1), sit_state(2)
FLAT = prefixed(RAW, "model.") | prefixed(EMA, "ema_model.")
WRAPPED = {  # content => whether the EMA and the raw weights are found
    "bare": (RAW, False, True),
    "DDP and compile": (prefixed(RAW, "module._orig_mod."), False, True),
    "blocks compiled": (compiled(RAW), False, True),
    "ema alone": ({"ema": prefixed(EMA, "module.")}, True, False),
    "both": ({"model": RAW, "ema_state_dict": EMA, "epoch": 3}, True, True),
    "Lightning": ({"state_dict": FLAT, "callbacks": {"a": 1}, "loops": {}}, True, True),
    "ema-pytorch": (prefixed(RAW, "online_model.") | prefixed(EMA, "ema_model."), True, True),
    "deep": ({"state": {"network": {"module": prefixed(RAW, "net.")}}}, False, True),
    "averaged": ({"module": RAW, "model_ema": {"module": EMA, "n": torch.ones(1)}}, True, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_sit_is_found_in_every_wrapper_and_its_ema_told_from_the_raw_weights(tmp_path, kind):
    content, has_ema, has_raw = WRAPPED[kind]
    torch.save(content, tmp_path / "c.pt")
    found = read_published(tmp_path / "c.pt")
    for state, known, there in ((found.ema, EMA, has_ema), (found.model, RAW, has_raw)):
        assert (state is not None) == there
        if state is not None:
            assert state.keys() == known.keys()
            assert all(torch.equal(state[name], known[name]) for name in known)


def test_an_average_without_names_is_told(tmp_path):
    """As that of diffusers and of torch_ema: a mere list of tensors; and of latent-diffusion."""
    undotted = {f"model_ema.{key.replace('.', '')}": value for key, value in EMA.items()}
    for content, unread in (
        ({"state_dict": prefixed(RAW, "model.") | undotted}, "state_dict.model_ema."),
        ({"model": RAW, "ema": {"decay": 0.9, "shadow_params": [*EMA.values()]}}, "ema"),
        ({"model": RAW, "ema": [*EMA.values()]}, "ema"),
        ({"model": RAW, "ema_decay": 0.9, "ema": None}, ""),
        (prefixed(RAW, "module.") | {"n_averaged": torch.tensor(7)}, ""),
    ):
        torch.save(content, tmp_path / "c.pt")
        found = read_published(tmp_path / "c.pt")
        assert found.ema is None and found.unread.startswith(unread)
        assert bool(found.unread) == bool(unread)
        assert torch.equal(found.model["pos_embed"], RAW["pos_embed"])


def test_of_two_averages_none_is_guessed(tmp_path):
    torch.save({"model": RAW, "model_ema1": EMA, "model_ema2": RAW}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="several such networks, in model_ema1 and in model_ema2"):
        read_published(tmp_path / "c.pt")


def test_folders_of_accelerate_and_diffusers(tmp_path):
    places = ["model.safetensors", "pytorch_model.bin"]
    places += ["transformer/diffusion_pytorch_model.safetensors", "checkpoints/0400000.pt"]
    for i, place in enumerate(places):
        file = tmp_path / str(i) / place
        file.parent.mkdir(parents=True)
        save = save_file if file.suffix == ".safetensors" else torch.save
        save(RAW, file)
        (file.parent / "config.json").write_text('{"num_heads": 3}')
        (tmp_path / str(i) / "args.json").write_text('{"path_type": "linear"}')
        found = read_published(tmp_path / str(i))
        assert found.file == file and found.model.keys() == RAW.keys()
        # those of REPA-E go first; where there are none, those of diffusers
        of_repa = "transformer" not in place
        assert found.args == ({"path_type": "linear"} if of_repa else {"num_heads": 3})


def test_folders_without_one_file_of_weights_are_named(tmp_path):
    for name, files, message in (
        ("empty", (), "is a folder without weights: none of diffusion_pytorch"),
        ("dcp", (".metadata", "__0_0.distcp"), "torch's distributed checkpoint, in parts"),
        ("run", ("checkpoints/1.pt", "checkpoints/2.pt"), r"2 weight files .*/1.pt, .*name one"),
        ("ours", ("sit_ema/config.json",), "a checkpoint of this project already"),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            (tmp_path / name / file).touch()
        with pytest.raises(UserError, match=message):
            read_published(tmp_path / name)


def test_both_layouts_of_latent_statistics(tmp_path):
    mean, std = torch.tensor(MEAN), torch.tensor(VAR).sqrt()
    shaped = {"mean": mean.view(1, 4, 1, 1), "std": std.view(1, 4, 1, 1)}
    torch.save(shaped, tmp_path / "lightningdit.pt")
    for path in (stats_file(tmp_path / "repae.pt"), tmp_path / "lightningdit.pt"):
        found = read_latent_stats(path)
        torch.testing.assert_close(found[0], mean)
        torch.testing.assert_close(found[1], std)


@pytest.mark.parametrize("where", ["args", "steps", "vae", "discriminator", "whole", "legacy"])
def test_a_malicious_pickle_is_not_executed(tmp_path, where):
    bomb, mark = tmp_path / "bomb.pt", tmp_path / "executed"
    if where in ("whole", "legacy"):
        torch.save(Bomb(mark), bomb, _use_new_zipfile_serialization=where == "whole")
        with pytest.raises(UserError):
            read_published(bomb)
    else:  # what is sound in the file is taken, what it asks for is not done
        found = read_published(joint_checkpoint(bomb, **{where: Bomb(mark)}))
        assert found.model and found.ema and found.has_vae == (where != "vae")
        assert found.step == (0 if where == "steps" else 400_000)
        assert ("enc_type" in found.args) == (where != "args")
    if where != "discriminator":
        for read in (read_discriminator, read_latent_stats):
            with suppress(UserError):
                read(bomb)
    assert not mark.exists()
    torch.load(bomb, weights_only=False)
    assert mark.exists()  # the file was a real one


def test_damaged_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_published(tmp_path / "absent.pt")
    (tmp_path / "run/checkpoints/0000004/sit_ema").mkdir(parents=True)
    for own, kind in (("", "run"), ("checkpoints", "run"), ("checkpoints/0000004", "checkpoint")):
        with pytest.raises(UserError, match=f"is a {kind} of this project already"):
            read_published(tmp_path / "run" / own)
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
        kind = r"(a text file|an empty file|a PyTorch file|a safetensors file|a zip archive)"
        with pytest.raises(UserError, match=kind) as error:
            read_published(tmp_path / name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(str(tmp_path))
    for content, message in (
        ([1, 2], "holds a list"),
        ({}, "holds nothing: expected a training checkpoint"),
        ({"opt": {"a": 1}}, "holds opt: expected"),
        ({"ema": {"a": 3}}, "holds ema: expected"),
        ({"ema": [torch.zeros(1)]}, "holds ema: expected"),
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
        with pytest.raises(UserError, match=r"tensor ema.pos_embed is not stored"):
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
