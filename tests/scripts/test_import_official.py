"""The command: its flags reach the import, and sampling from its output gives the pictures that an
independent implementation gives. What is imported how: tests/utils/published/test_importing.py.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sample_ddp
from models.checks.errors import UserError
from scripts import import_official
from tests.published_files import (
    CLASSES,
    HEADS,
    MEAN,
    SIDE,
    VAR,
    Bomb,
    compvis_vae,
    disc_state,
    joint_checkpoint,
    original_sit_state,
    sit_state,
    stats_file,
    velocity,
)
from utils import cli
from utils.sampling.noise import ImageNoise

STEPS, NUM = 5, 4


def run(*words) -> None:
    import_official.main([str(word) for word in words])


@torch.no_grad()
def pipeline(w: dict, vae: torch.nn.Module, mean, var, sit_time: bool = False) -> np.ndarray:
    """Euler from noise to data with the noise and labels of sample_ddp.py --seed 0, decoded."""
    x = ImageNoise(0, range(NUM)).start(4, SIDE, SIDE)
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


def samples(checkpoint: Path, out: Path, monkeypatch) -> np.ndarray:
    words = f"--num-samples {CLASSES} --steps {STEPS} --solver ode-euler --precision fp32"
    words += f" --batch-size {CLASSES} --class-balanced --checkpoint {checkpoint} --out {out}"
    monkeypatch.setattr(sys, "argv", ["sample_ddp.py", *words.split()])
    sample_ddp.main()
    with np.load(out) as file:
        return file["arr_0"][:NUM].astype(float)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1
    assert expected.std() > 10  # pictures, not a grey field


def test_samples_of_a_training_checkpoint(tmp_path, monkeypatch, capsys):
    run(joint_checkpoint(tmp_path / "c.pt"), tmp_path / "out")
    printed = capsys.readouterr().out
    assert "weights: model, without the prefix module. and ema\n" in printed
    assert "time: t = 0 is data (projectors.*, bn.*, enc_type=" in printed
    assert "interpolant: linear\n" in printed
    assert "latent norm: bn.* of the checkpoint\n" in printed and "step 400000" in printed
    var = [v * 1.2 for v in VAR]  # of the EMA
    expected = pipeline(sit_state(2), compvis_vae(), MEAN, var)
    assert_same(samples(tmp_path / "out", tmp_path / "a.npz", monkeypatch), expected)


def test_samples_of_an_original_sit_in_its_own_time(tmp_path, monkeypatch, capsys):
    state = original_sit_state(5, out=8)
    torch.save({"ema": state, "discriminator": disc_state()}, tmp_path / "SiT.pt")
    torch.save({"state_dict": compvis_vae().state_dict()}, tmp_path / "vae.ckpt")
    stats = stats_file(tmp_path / "any.pt")
    words = ["--vae", tmp_path / "vae.ckpt", "--stats", stats, "--num-heads", HEADS]
    run(tmp_path / "SiT.pt", tmp_path / "out", *words, "--allow-learn-sigma", "slice")
    assert "converted" in capsys.readouterr().out
    expected = pipeline(state, compvis_vae(), MEAN, VAR, sit_time=True)
    assert_same(samples(tmp_path / "out", tmp_path / "a.npz", monkeypatch), expected)
    kept = ["--allow-learn-sigma", "slice", "--time", "repa"]
    run(tmp_path / "SiT.pt", tmp_path / "kept", *words, *kept)
    assert "time: t = 0 is data (--time repa)\n" in capsys.readouterr().out


def test_a_dit_is_warned_about(tmp_path, capsys):
    torch.save(original_sit_state(5, out=8), tmp_path / "DiT-XL-2-256x256.pt")
    words = ["--vae", "tiny-f8d4", "--scaling-factor", 0.5, "--num-heads", HEADS]
    run(tmp_path / "DiT-XL-2-256x256.pt", tmp_path / "out", *words, "--allow-learn-sigma", "slice")
    assert "warning: a DiT predicts noise" in capsys.readouterr().out


def test_a_refused_file_ends_the_command_with_one_line_and_exit_code_2(tmp_path, capsys):
    path = tmp_path / "bomb.pt"
    torch.save(Bomb(tmp_path / "executed"), path)
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: run(path, tmp_path / "out"))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "bomb.pt" in error
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def test_flags_that_cannot_be_are_refused(tmp_path):
    stats = stats_file(tmp_path / "s.pt")
    for words, message in (
        (["--stats", stats, "--scaling-factor", 0.5], "exclude each other"),
        (["--scaling-factor", 0], "must be a positive number"),
        (["--scaling-factor", "nan"], "must be a positive number"),
        (["--num-heads", -3], "expected a whole number"),
        (["--time", "dit"], "invalid choice"),
        (["--allow-learn-sigma", "keep"], "invalid choice"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "c.pt", tmp_path / "out", *words)
