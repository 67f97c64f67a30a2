"""Pictures of latents and of progress: equal things look equal, and mistakes end in one line.

python -m pytest tests/scripts/test_visualize_latents.py        (CPU, no network)
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sample_ddp
from models.checks.errors import UserError
from models.sit import SiT
from models.vae import build_vae
from scripts import visualize_latents
from utils import cli
from utils.checkpoint import Checkpoints
from utils.data.registry import open_source
from utils.pictures import latents as pictures
from utils.pictures.grid import Row, join_panels, save_grid_of_rows
from utils.pictures.progress import titles
from utils.sampling.images import draw_images
from utils.sampling.settings import SamplingSettings

CELL, GAP = 96, 3  # of the pictures below: their images are 16 or 32 px
SAMPLING = ("--precision", "fp32", "--steps", "3")


pytestmark = pytest.mark.usefixtures("one_thread")


def awake(name: str, seed: int, strength: float = 0.05):
    """A VAE; the same up to `strength` for every seed."""
    torch.manual_seed(0)
    vae = build_vae(name).requires_grad_(False)
    torch.manual_seed(seed)
    for p in vae.parameters():
        p += strength * torch.randn_like(p)
    return vae


@pytest.fixture(scope="module")
def vaes(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vaes")
    made = {"before": ("tiny-f8d4", 1), "after": ("tiny-f8d4", 2), "wide": ("tiny-f8d16", 1)}
    for label, (name, seed) in made.items():
        awake(name, seed).save(root / label)
    torch.manual_seed(0)
    flat = build_vae("tiny-f8d4").requires_grad_(False)
    for p in flat.net.quant_conv.parameters():
        p.zero_()
    flat.save(root / "flat")
    return {label: root / label for label in (*made, "flat")}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Steps 2 and 4 have the same weights, 6 has others, 8 is damaged, 10 unfinished."""
    run = tmp_path_factory.mktemp("exps") / "a-run"
    checkpoints = Checkpoints(run, keep_last=9)
    for step, seed in {2: 0, 4: 0, 6: 1, 8: 1}.items():
        checkpoints.save(step, lambda folder, seed=seed: fill(folder, seed), {})
    (run / "checkpoints/0000008/sit_ema/config.json").write_text("{}")
    (run / "checkpoints/0000010").mkdir()
    return run


def fill(folder: Path, seed: int, num_classes: int = 5, vae: str = "tiny-f2d4") -> None:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "depth": 2, "num_heads": 2, "align_depth": 1, "encoder_dims": [8]}
    sit = SiT(**shape, input_size=8, num_classes=num_classes, projector_dim=16)
    for p in sit.parameters():
        torch.nn.init.normal_(p, std=0.2)
    sit.bn.set_stats(torch.zeros(4), torch.tensor(1.0))
    sit.save_pretrained(folder / "sit_ema")
    awake(vae, seed).save(folder / "vae")


def run(*words) -> list[Row]:
    """The rows of the picture that the script writes; tests/utils/pictures/test_grid.py shows that
    the file holds them pixel by pixel."""
    drawn = []

    def keep(path, rows, headings=None):
        save_grid_of_rows(path, rows, headings)
        drawn.extend(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize_latents, "save_grid_of_rows", keep)
        patch.setattr(sys, "argv", ["visualize_latents.py", *map(str, words)])
        visualize_latents.main()
    return drawn


def latents(out: Path, *vaes, **flags) -> list[Row]:
    """Of digits of 32 px."""
    flags = {"data": "digits", "resolution": 32, "num": 3, "fit": 40, "out": out} | flags
    return run("latents", *(w for k, v in flags.items() for w in (f"--{k}", v)), "--vae", *vaes)


def progress(out: Path, *words) -> list[Row]:
    return run("progress", *words, *SAMPLING, "--num", 4, "--out", out)


def cells(drawn: list[Row], rows: int, columns: int) -> np.ndarray:
    """(rows, columns, CELL, CELL, 3)"""
    step = CELL + GAP
    pixels = join_panels(drawn)
    assert pixels.shape == (rows * step, columns * step, 3)
    return pixels.reshape(rows, step, columns, step, 3).swapaxes(1, 2)[:, :, :CELL, :CELL]


def enlarged(x_u8: torch.Tensor) -> np.ndarray:
    """(N, 3, h, w) => (N, CELL, CELL, 3)"""
    times = CELL // x_u8.shape[-1]
    return x_u8.permute(0, 2, 3, 1).numpy().repeat(times, 1).repeat(times, 2)


# --------------------------------------------------------------------------------------
# Latents.


def test_a_row_of_images_and_one_for_each_vae(vaes, tmp_path, capsys):
    rows = latents(tmp_path / "new" / "a.png", f"Before={vaes['before']}", vaes["wide"])
    assert [row.title for row in rows] == ["images", "Before", "wide"]
    assert [row.notes[0] for row in rows] == ["32 px", "4 x 4 x 4", "16 x 4 x 4"]
    assert (tmp_path / "new" / "a.png").is_file()
    panels = cells(rows, 3, 3)
    source = open_source("digits", None, 32)
    images = torch.stack([source[i][0] for i in (0, 599, 1198)])
    assert np.array_equal(panels[0], enlarged(images))
    blocks = panels[1:].reshape(2, 3, 4, 24, 4, 24, 3)  # 4 x 4 latent pixels
    assert (blocks == blocks[:, :, :, :1, :, :1]).all()
    assert panels[1:].std((2, 3)).min() > 5
    told = capsys.readouterr().out
    for words in ("Before: 40 latents of 4 x 4 x 4", "wide: 40 latents of 16 x 4 x 4"):
        assert words in told
    assert told.count("spatial variance") == 4 and told.count("explained by the three axes") == 2


@pytest.mark.parametrize("basis", ["own", "shared", "first"])
def test_identical_vaes_look_identical(vaes, tmp_path, basis):
    panels = cells(latents(tmp_path / "a.png", vaes["before"], vaes["before"], basis=basis), 3, 3)
    assert np.array_equal(panels[1], panels[2])


def test_the_same_command_draws_the_same_picture(vaes, tmp_path):
    for name in "ab":
        latents(tmp_path / f"{name}.png", vaes["before"], vaes["after"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.slow
def test_what_the_bases_are_fitted_on(vaes, tmp_path):
    def draw(basis, *labels):
        picture = latents(tmp_path / "a.png", *(vaes[v] for v in labels), basis=basis)
        return cells(picture, 1 + len(labels), 3)[1:]

    (alone,) = draw("own", "before")
    own, shared, first = (draw(kind, "before", "after") for kind in ("own", "shared", "first"))
    assert np.array_equal(own[0], alone) and np.array_equal(first[0], alone)
    assert not np.array_equal(shared[0], alone)
    assert not np.array_equal(own[1], first[1]) and not np.array_equal(shared[1], first[1])


def test_reconstructions_come_below(vaes, tmp_path):
    words = (vaes["before"], vaes["after"], "--reconstructions")
    panels = cells(latents(tmp_path / "a.png", *words), 5, 3)
    source, vae = open_source("digits", None, 32), awake("tiny-f8d4", 1).eval()
    x_pm1 = torch.stack([source[i][0] for i in (0, 599, 1198)]) / 127.5 - 1
    expected = ((vae.decode(vae.encode(x_pm1).mean) + 1) * 127.5).round().clamp(0, 255).byte()
    assert np.array_equal(panels[2], enlarged(expected))


def test_collapsed_latents_are_grey(vaes, tmp_path, capsys):
    panels = cells(latents(tmp_path / "a.png", vaes["flat"]), 2, 3)
    assert (panels[1] == 128).all()
    assert "spatial variance 0, total variation 0" in capsys.readouterr().out


def test_a_small_source_is_shown_as_a_whole():
    assert pictures.spread(3, 8) == [0, 1, 2]
    assert pictures.spread(1000, 4) == [0, 250, 500, 750]


@pytest.mark.parametrize(
    ("word", "label", "spec"),
    [
        ("sdvae", "sdvae", "sdvae"),
        ("after tuning=e2e-sdvae", "after tuning", "e2e-sdvae"),
        ("stabilityai/sd-vae-ft-mse", "sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"),
        ("exps/x/checkpoints/0400000", "x 0400000", "exps/x/checkpoints/0400000"),
        ("exps/x/checkpoints/0400000/vae", "x 0400000", "exps/x/checkpoints/0400000/vae"),
    ],
)
def test_labels(word, label, spec):
    assert pictures.split_label(word) == (label, spec)


def test_an_equals_sign_in_a_folder_makes_no_label(tmp_path):
    folder = tmp_path / "lr=1e-4"
    folder.mkdir()
    assert pictures.split_label(str(folder)) == ("lr=1e-4", str(folder))


def test_refusals_of_latents(vaes, tmp_path):
    out = tmp_path / "a.png"
    for basis in ("shared", "first"):
        with pytest.raises(UserError, match="equally many latent channels, not before 4, wide 16"):
            latents(out, vaes["before"], vaes["wide"], basis=basis)
    with pytest.raises(UserError, match="resolution 20 is not a multiple"):
        latents(out, vaes["before"], resolution=20)
    with pytest.raises(UserError, match=r"no VAE sdvea: .* did you mean sdvae"):
        latents(out, vaes["before"], "sdvea")
    with pytest.raises(UserError, match="argument --fit: '0': expected a whole number"):
        latents(out, vaes["before"], fit=0)
    with pytest.raises(UserError, match=r"must end in \.png"):
        latents(tmp_path / "a.jpg", vaes["before"])
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------
# Progress.


def test_whole_checkpoints_in_order_equal_ones_look_equal(run_dir, tmp_path, capsys):
    picture = progress(tmp_path / "a.png", "--run", run_dir)
    rows = cells(picture, 3, 4)
    assert np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[1], rows[2])
    told = capsys.readouterr().out
    assert "0000008: sit_ema/config.json is damaged" in told
    assert "0000010: no valid state.json" in told
    steps = [line for line in told.splitlines() if line.startswith("sampled")]
    assert [line[-7:] for line in steps] == ["0000002", "0000004", "0000006"]


def test_images_are_those_of_draw_images_and_of_sample_ddp(run_dir, tmp_path):
    folder = run_dir / "checkpoints/0000006"
    (row,) = cells(progress(tmp_path / "a.png", folder, "--seed", 3), 1, 4)
    sit = SiT.from_pretrained(folder / "sit_ema").eval()
    settings = SamplingSettings(seed=3, solver="ode-ab2", steps=3, cfg_scale=2.0, precision="fp32")
    vae = awake("tiny-f2d4", 1).eval()
    images = draw_images(settings, sit, vae, range(4), torch.device("cpu"))
    assert np.array_equal(row, enlarged(images))
    words = ["--checkpoint", folder, "--out", tmp_path / "a.npz", "--num-samples", 4, "--seed", 3]
    words += ["--solver", "ode-ab2", "--cfg-scale", 2, *SAMPLING]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", ["sample_ddp.py", *map(str, words)])
        sample_ddp.main()
    x_u8 = torch.from_numpy(np.load(tmp_path / "a.npz")["arr_0"]).permute(0, 3, 1, 2)
    assert np.array_equal(row, enlarged(x_u8))


def test_chosen_classes_of_a_run_by_its_name(run_dir, tmp_path):
    words = ("--classes", "2,0", "--seed", 3)
    (row,) = cells(progress(tmp_path / "a.png", run_dir, *words), 1, 4)
    settings = SamplingSettings(seed=3, solver="ode-ab2", steps=3, cfg_scale=2.0, precision="fp32")
    sit = SiT.from_pretrained(run_dir / "checkpoints/0000006/sit_ema").eval()
    chosen = replace(settings, classes=(2, 0))
    images = draw_images(chosen, sit, awake("tiny-f2d4", 1).eval(), range(4), torch.device("cpu"))
    assert np.array_equal(row, enlarged(images))


def test_many_images_are_those_of_one_batch(run_dir, tmp_path):
    words = (run_dir / "checkpoints/0000006", "--solver", "sde")
    whole = cells(progress(tmp_path / "a.png", *words), 1, 4).astype(int)
    parts = cells(progress(tmp_path / "b.png", *words, "--batch-size", 3), 1, 4)
    assert abs(whole - parts).max() <= 1


def test_two_runs_are_told_apart(run_dir, tmp_path):
    other = tmp_path / "exps" / "other"
    saved = Checkpoints(other).save(20_000, lambda folder: fill(folder, 0), {})
    first = run_dir / "checkpoints/0000002"
    rows = cells(progress(tmp_path / "a.png", first, "--run", other), 2, 4)
    assert np.array_equal(rows[0], rows[1])
    assert titles(first, several=True) == ("a-run", ["step 2"])
    assert titles(saved, several=False) == ("step 20,000", [])
    assert titles(tmp_path / "published", several=True) == ("published", [])


def test_refusals_of_progress(run_dir, tmp_path):
    out, folder = tmp_path / "a.png", run_dir / "checkpoints/0000002"
    with pytest.raises(UserError, match="name checkpoints like"):
        progress(out)
    (nothing := tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no whole checkpoint in"):
        progress(out, "--run", nothing)
    with pytest.raises(UserError, match="has no sit_ema/"):
        progress(out, nothing)
    with pytest.raises(UserError, match="expected a SiT"):
        progress(out, run_dir / "checkpoints/0000008")
    with pytest.raises(UserError, match="at least 0 and at most 1"):
        progress(out, folder, "--guidance-low", 2)
    fill(tmp_path / "three", 0, num_classes=3)
    with pytest.raises(UserError, match="know 3, 5 classes"):
        progress(out, folder, tmp_path / "three")
    assert not out.exists()


def test_a_mistake_is_one_line_and_exit_code_2(vaes, tmp_path, monkeypatch, capsys):
    words = ("latents", "--data", "digits", "--out", tmp_path / "a.png", "--basis", "shared")
    words = ("visualize_latents.py", *words, "--vae", vaes["flat"], vaes["wide"])
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.run(visualize_latents.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: --basis shared")
