"""Published weights in: layouts written, and pipelines run, independently of `utils.official`.

    python -m pytest tests/scripts/test_import_official.py        (CPU, no network)

The SiT below works on a plain dict of tensors, from the published key names and equations.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from models.errors import UserError
from models.sit import SiT
from models.vae import load_vae
from scripts import import_official
from tests.models.test_vae import F8D4, CompVisVAE
from tests.tiny import run_script
from utils.checkpoint import find_fault
from utils.draws import generator

CLASSES, WIDTH, HEADS, DEPTH, PATCH, SIDE = 5, 48, 3, 3, 2, 4  # 32 px, 2x2 tokens
MEAN, VAR = [0.3, -0.2, 0.1, 0.0], [0.5, 2.0, 1.0, 0.25]
STEPS, NUM = 5, 4


# ---------------------------------------------------------------- what others write


def sit_state(seed: int, channels=4, out=4, projectors=True, bn=True, qk_norm=False) -> dict:
    """Random weights under published names; pos_embed is "learned": nothing like sin-cos."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, std=0.15):
        return torch.randn(shape, generator=g) * std

    state = {"pos_embed": draw(1, (SIDE // PATCH) ** 2, WIDTH, std=0.5)}

    def linear(name, n_in, n_out):
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(n_out, n_in), draw(n_out)

    state["x_embedder.proj.weight"] = draw(WIDTH, channels, PATCH, PATCH)
    state["x_embedder.proj.bias"] = draw(WIDTH)
    linear("t_embedder.mlp.0", 256, WIDTH)
    linear("t_embedder.mlp.2", WIDTH, WIDTH)
    state["y_embedder.embedding_table.weight"] = draw(CLASSES + 1, WIDTH, std=0.5)
    for i in range(DEPTH):
        linear(f"blocks.{i}.attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"blocks.{i}.attn.proj", WIDTH, WIDTH)
        linear(f"blocks.{i}.mlp.fc1", WIDTH, 4 * WIDTH)
        linear(f"blocks.{i}.mlp.fc2", 4 * WIDTH, WIDTH)
        linear(f"blocks.{i}.adaLN_modulation.1", WIDTH, 6 * WIDTH)
        for name in ("q_norm", "k_norm") if qk_norm else ():
            state[f"blocks.{i}.attn.{name}.weight"] = 1 + draw(WIDTH // HEADS)
            state[f"blocks.{i}.attn.{name}.bias"] = draw(WIDTH // HEADS)
    linear("final_layer.linear", WIDTH, PATCH * PATCH * out)
    linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    if projectors:
        for j, (n_in, n_out) in {0: (WIDTH, 24), 2: (24, 24), 4: (24, 16)}.items():
            linear(f"projectors.0.{j}", n_in, n_out)
    if bn:
        state["bn.running_mean"] = torch.tensor(MEAN)
        state["bn.running_var"] = torch.tensor(VAR) * (1 + seed / 10)
        state["bn.num_batches_tracked"] = torch.tensor(400_000 + seed)
    return state


def compvis_vae(seed: int = 3) -> CompVisVAE:
    torch.manual_seed(seed)
    return CompVisVAE(**F8D4).eval()


def disc_state() -> dict:
    """The pix2pix discriminator as latent-diffusion stores it."""
    state, width = {"main.0.weight": torch.randn(8, 3, 4, 4), "main.0.bias": torch.randn(8)}, 8
    for n, i in enumerate((2, 5, 8), start=1):
        wider = 8 * 2**n
        state[f"main.{i}.weight"] = torch.randn(wider, width, 4, 4)
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"main.{i + 1}.{name}"] = torch.rand(wider)
        state[f"main.{i + 1}.num_batches_tracked"] = torch.tensor(7)
        width = wider
    return state | {"main.11.weight": torch.randn(1, width, 4, 4), "main.11.bias": torch.randn(1)}


def namespace(**changes) -> argparse.Namespace:
    known = {"model": "SiT-XL/2", "num_classes": CLASSES, "encoder_depth": 2, "cfg_prob": 0.1}
    known |= {"path_type": "linear", "prediction": "v", "enc_type": "dinov2-vit-b"}
    return argparse.Namespace(**(known | {"report_to": None, "num_heads": HEADS} | changes))


def optimizer_state() -> dict:
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def joint_checkpoint(path: Path, **changes) -> Path:
    content = {
        "model": {f"module.{k}": v for k, v in sit_state(1).items()},
        "ema": sit_state(2),
        "vae": {f"_orig_mod.{k}": v for k, v in compvis_vae().state_dict().items()},
        "discriminator": disc_state(),
        **{name: optimizer_state() for name in ("opt", "opt_vae", "opt_disc")},
        "args": namespace(),
        "steps": 400_000,
    }
    torch.save({k: v for k, v in (content | changes).items() if v is not None}, path)
    return path


def stats_file(path: Path, mean=tuple(MEAN), var=tuple(VAR)) -> Path:
    view = (1, len(mean), 1, 1)
    scale = torch.tensor(var).rsqrt().view(view)
    torch.save({"latents_scale": scale, "latents_bias": torch.tensor(mean).view(view)}, path)
    return path


# ---------------------------------------------------------------- an independent pipeline


def velocity(w: dict, x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
    """The SiT on a dict of tensors: all that its output layer predicts."""

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (
            h.var(-1, keepdim=True, correction=0) + 1e-6
        ) ** 0.5

    freqs = torch.tensor([10000 ** (-k / 128) for k in range(128)])
    emb = torch.cat([(t * freqs).cos(), (t * freqs).sin()])[None]
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", emb)))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH)
    h = h.flatten(2).mT + w["pos_embed"]
    for i in range(DEPTH):
        mods = linear(f"blocks.{i}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        q, k, v = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + mods[1]) + mods[0]).chunk(3, -1)
        q, k, v = (a.unflatten(2, (HEADS, -1)).transpose(1, 2) for a in (q, k, v))
        if f"blocks.{i}.attn.q_norm.weight" in w:
            name = f"blocks.{i}.attn."
            shape = q.shape[-1:]
            q = F.layer_norm(q, shape, w[name + "q_norm.weight"], w[name + "q_norm.bias"])
            k = F.layer_norm(k, shape, w[name + "k_norm.weight"], w[name + "k_norm.bias"])
        a = ((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        h = h + mods[2] * linear(f"blocks.{i}.attn.proj", a.transpose(1, 2).flatten(2))
        m = linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + mods[4]) + mods[3])
        h = h + mods[5] * linear(f"blocks.{i}.mlp.fc2", F.gelu(m, approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    grid = SIDE // PATCH
    h = h.reshape(len(x), grid, grid, PATCH, PATCH, -1)
    return torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), -1, SIDE, SIDE)


@torch.no_grad()
def pipeline(w: dict, vae: CompVisVAE, mean, var, sit_time: bool = False) -> np.ndarray:
    """Euler from noise to data with the noise and labels of sample_ddp.py --seed 0, decoded."""
    x = torch.stack([torch.randn(4, SIDE, SIDE, generator=generator("sample", 0, i))
                     for i in range(NUM)])  # fmt: skip
    y = torch.tensor([i % CLASSES for i in range(NUM)])
    for i in range(STEPS):
        if sit_time:  # t = 0 noise, t = 1 data, dx/dt = v
            x = x + velocity(w, x, i / STEPS, y)[:, :4] / STEPS
        else:
            x = x - velocity(w, x, 1 - i / STEPS, y)[:, :4] / STEPS
    mean, var = (torch.tensor(v).view(1, 4, 1, 1) for v in (mean, var))
    images = vae.decoder(vae.post_quant_conv(x * var.sqrt() + mean))
    images = ((images + 1) * 127.5).round().clamp(0, 255)
    return images.permute(0, 2, 3, 1).numpy()


def samples(checkpoint: Path, out: Path) -> np.ndarray:
    """sample_ddp.py in a process of its own."""
    words = f"--num-samples {CLASSES} --steps {STEPS} --solver ode-euler --precision fp32"
    words += f" --batch-size {CLASSES} --class-balanced"
    result = run_script("sample_ddp.py", "--checkpoint", checkpoint, "--out", out, *words.split())
    assert result.returncode == 0, result.stderr
    with np.load(out) as file:
        return file["arr_0"][:NUM].astype(float)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1
    assert expected.std() > 10  # pictures, not a grey field


def run(*words) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["import_official.py", *map(str, words)])
        import_official.main()


def state_of(out: Path) -> dict:
    assert find_fault(out) is None
    return json.loads((out / "state.json").read_text())


# ---------------------------------------------------------------- training checkpoints


@pytest.fixture(scope="module")
def joint(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("joint")
    path = joint_checkpoint(folder / "0400000.pt")
    run(path, folder / "out")
    return path, folder / "out"


def test_a_training_checkpoint_is_a_whole_checkpoint_of_ours(joint):
    state = state_of(joint[1])
    assert state["step"] == 400_000 and state["imported"] is True and state["path"] == "linear"
    assert len(state["source"]["sha256"]) == 64 and state["optimizer_state"] is None
    names = {p.name for p in joint[1].iterdir()}
    assert names == {"vae", "sit", "sit_ema", "discriminator.safetensors", "state.json"}
    disc = load_file(joint[1] / "discriminator.safetensors")
    torch.manual_seed(3)
    assert disc.keys() == disc_state().keys() and disc["main.9.running_var"].shape == (64,)
    assert not list(joint[1].parent.glob(".tmp*"))


def test_its_samples_are_those_of_the_independent_pipeline(joint, tmp_path):
    var = [v * 1.2 for v in VAR]  # of the EMA
    expected = pipeline(sit_state(2), compvis_vae(), MEAN, var)
    assert_same(samples(joint[1], tmp_path / "a.npz"), expected)


def test_ema_and_raw_weights_pos_embed_and_statistics_are_kept_apart(joint):
    for name, seed in (("sit", 1), ("sit_ema", 2)):
        known, sit = sit_state(seed), SiT.from_pretrained(joint[1] / name)
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


def test_without_ema_the_raw_weights_are_both(tmp_path):
    run(joint_checkpoint(tmp_path / "c.pt", ema=None), tmp_path / "out")
    found = SiT.from_pretrained(tmp_path / "out/sit_ema").state_dict()
    assert torch.equal(found["pos_embed"], sit_state(1)["pos_embed"])
    assert "both" in state_of(tmp_path / "out")["source"]["weights"]


def test_ldm_only_finds_the_vae_it_names_beside_it(tmp_path):
    torch.save(compvis_vae().state_dict(), tmp_path / "e2e.pt")
    args = namespace(vae_ckpt="/nowhere/pretrained/e2e.pt", path_type="cosine")
    path = joint_checkpoint(tmp_path / "c.pt", vae=None, discriminator=None, args=args)
    run(path, tmp_path / "out")
    assert state_of(tmp_path / "out")["path"] == "cosine"
    assert SiT.from_pretrained(tmp_path / "out/sit").config.latent_norm == "fixed"
    decoder = load_vae(str(tmp_path / "out")).net.state_dict()["decoder.conv_in.weight"]
    assert torch.equal(decoder, compvis_vae().decoder.conv_in.weight)
    (tmp_path / "e2e.pt").rename(tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"names the VAE /nowhere/.*give --vae"):
        run(path, tmp_path / "again")
    run(path, tmp_path / "again", "--vae", tmp_path / "other.pt")
    with pytest.raises(UserError, match="decodes 16: give its own"):
        run(path, tmp_path / "third", "--vae", "tiny-f8d16")


def test_qk_norm_gives_the_heads_and_half_precision_is_widened(tmp_path):
    state = {k: v.half() if v.is_floating_point() else v
             for k, v in sit_state(4, qk_norm=True).items()}  # fmt: skip
    args = namespace(num_heads=None)
    path = joint_checkpoint(tmp_path / "c.pt", model=None, ema=state, args=args)
    run(path, tmp_path / "out")
    sit = SiT.from_pretrained(tmp_path / "out/sit_ema").eval()
    assert sit.config.qk_norm and sit.config.num_heads == HEADS and sit.dtype == torch.float32
    x, y = torch.randn(2, 4, SIDE, SIDE), torch.tensor([0, 3])
    with torch.no_grad():
        found = sit(x, torch.full((2,), 0.3), y)[0]
    expected = velocity({k: v.float() for k, v in state.items()}, x, 0.3, y)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- original SiT, VAE alone


def test_original_sit_with_stats_is_sampled_in_its_own_time(tmp_path):
    torch.save(sit_state(5, projectors=False, bn=False), tmp_path / "SiT.pt")
    torch.save({"state_dict": compvis_vae().state_dict()}, tmp_path / "vae.ckpt")
    stats = stats_file(tmp_path / "any.pt")
    words = ["--vae", tmp_path / "vae.ckpt", "--stats", stats, "--num-heads", HEADS]
    run(tmp_path / "SiT.pt", tmp_path / "out", *words)
    known = sit_state(5, projectors=False, bn=False)
    expected = pipeline(known, compvis_vae(), MEAN, VAR, sit_time=True)
    assert_same(samples(tmp_path / "out", tmp_path / "a.npz"), expected)
    assert "converted" in state_of(tmp_path / "out")["source"]["time"]
    run(tmp_path / "SiT.pt", tmp_path / "kept", *words, "--time", "repa")
    found = SiT.from_pretrained(tmp_path / "kept/sit_ema").state_dict()
    assert all(torch.equal(found[k], known[k]) for k in known)


def test_learn_sigma_is_refused_or_sliced(tmp_path, capsys):
    state = sit_state(6, out=8, projectors=False, bn=False)
    torch.save({"model": state, "ema": state, "args": argparse.Namespace(path_type="Linear")},
               tmp_path / "SiT.pt")  # fmt: skip
    words = [tmp_path / "SiT.pt", tmp_path / "out", "--vae", "tiny-f8d4", "--num-heads", HEADS]
    with pytest.raises(UserError, match=r"learn_sigma head .*--allow-learn-sigma slice"):
        run(*words)
    words += ["--allow-learn-sigma", "slice"]
    with pytest.raises(UserError, match=r"no latent norm, .*--stats .*--scaling-factor"):
        run(*words)
    run(*words, "--scaling-factor", 0.5)
    assert "latent norm: --scaling-factor 0.5" in capsys.readouterr().out
    sit = SiT.from_pretrained(tmp_path / "out/sit_ema").eval()
    x, y = torch.randn(2, 4, SIDE, SIDE), torch.tensor([1, 2])
    with torch.no_grad():
        found = sit(x, torch.full((2,), 0.3), y)[0]
        expected = -velocity(state, x, 0.7, y)[:, :4]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert sit.bn.running_var.tolist() == [4.0] * 4 and sit.config.latent_norm == "fixed"
    assert not len(sit.projectors)


def test_a_vae_alone_with_the_statistics_beside_it_and_its_discriminator(tmp_path):
    torch.save(compvis_vae().state_dict(), tmp_path / "e2e.pt")
    stats_file(tmp_path / "e2e-latents-stats.pt")
    torch.save(disc_state(), tmp_path / "d.pt")
    run(tmp_path / "e2e.pt", tmp_path / "out", "--discriminator", tmp_path / "d.pt")
    assert state_of(tmp_path / "out")["source"]["latent_norm"].endswith("e2e-latents-stats.pt")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("vae", "discriminator.safetensors", "state.json")
    }
    vae, reference = load_vae(str(tmp_path / "out")).double(), compvis_vae().double()
    torch.testing.assert_close(vae.latent_stats()[1], torch.tensor(VAR).sqrt())
    z = torch.randn(1, 4, SIDE, SIDE, dtype=torch.float64)
    with torch.no_grad():
        expected = reference.decoder(reference.post_quant_conv(z)).float()
        torch.testing.assert_close(vae.decode(z), expected, atol=1e-5, rtol=1e-6)


# ---------------------------------------------------------------- refusals


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("where", ["args", "steps", "vae", "discriminator", "legacy"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, where):
    bomb, mark = tmp_path / "bomb.pt", tmp_path / "executed"
    if where == "legacy":
        torch.save(Bomb(mark), bomb, _use_new_zipfile_serialization=False)
    else:
        joint_checkpoint(bomb, **{where: Bomb(mark)})
    words = [bomb, tmp_path / "out"]
    if where == "args":  # the exit code, once, in a real process
        result = run_script("scripts/import_official.py", *words)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert result.stderr.count("\n") == 1 and "system" in result.stderr, result.stderr
    else:
        with pytest.raises(UserError, match=r"is refused, .* it asks for \w+\.system"):
            run(*words)
    assert not mark.exists() and not (tmp_path / "out").exists()
    torch.load(bomb, weights_only=False)
    assert mark.exists()  # the file was a real one


def test_malicious_side_files_are_refused_too(tmp_path):
    torch.save(compvis_vae().state_dict(), tmp_path / "vae.pt")
    torch.save({"latents_scale": Bomb(tmp_path / "executed")}, tmp_path / "bomb.pt")
    for option in ("--stats", "--discriminator"):
        with pytest.raises(UserError, match="is refused"):
            run(tmp_path / "vae.pt", tmp_path / "out", option, tmp_path / "bomb.pt")
    assert not (tmp_path / "executed").exists()


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
        ({"args": namespace(num_heads=None)}, "give --num-heads, a divisor of 48"),
        ({"args": namespace(num_classes=1000)}, "6 label rows do not fit"),
        ({"args": namespace(path_type="VP")}, "path_type=VP"),
        ({"vae": {"encoder.conv_in.weight": torch.zeros(2)}}, "is no CompVis autoencoder"),
        ({"discriminator": {"main.0.weight": torch.zeros(8, 3, 4, 4)}}, r"\d+ missing"),
        ({"ema": {"a": 3}}, "ema of .* is not a state dict"),
        ({"ema": None, "model": None}, "expected a training checkpoint"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, changes, message):
    changes = {k: edited(v) if callable(v) else v for k, v in changes.items()}
    path = joint_checkpoint(tmp_path / "c.pt", **changes)
    with pytest.raises(UserError, match=message):
        run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp*"))


def test_options_that_cannot_be_are_refused(joint, tmp_path):
    path, out = joint
    with pytest.raises(UserError, match="exists and is not empty"):
        run(path, out)
    with pytest.raises(UserError, match="holds its VAE: leave out --vae"):
        run(path, tmp_path / "out", "--vae", "tiny-f8d4")
    with pytest.raises(UserError, match="no such file"):
        run(tmp_path / "absent.pt", tmp_path / "out")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="is refused"):
        run(tmp_path / "text.pt", tmp_path / "out")
    torch.save(compvis_vae().state_dict(), tmp_path / "vae.pt")
    stats = stats_file(tmp_path / "s.pt", mean=(0.0, 1.0), var=(1.0, 1.0))
    with pytest.raises(UserError, match="is of 2 channels, the VAE has 4"):
        run(tmp_path / "vae.pt", tmp_path / "out", "--stats", stats)
    stats = stats_file(tmp_path / "s.pt", var=(1.0, float("inf"), 1.0, 1.0))
    with pytest.raises(UserError, match="positive finite"):
        run(tmp_path / "vae.pt", tmp_path / "out", "--stats", stats)
