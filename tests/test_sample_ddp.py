"""sample_ddp.py: the same images for any number of ranks, any batch size, and after a kill.

    python -m pytest tests/test_sample_ddp.py        (CPU, no network; 2 ranks over gloo)

What ranks, kills and exit codes show is run through the real script in processes of its own; the
rest calls its `main` here. `accelerate launch --cpu --num_processes 2` starts one process only
(accelerate 1.15), hence `--multi_gpu`, which on a machine without GPUs makes CPU ranks.
"""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample_ddp
from models.errors import UserError
from models.sit import SiT
from models.vae import build_vae
from utils import cli
from utils.generate import Sampling, draw_labels
from utils.shards import Shards

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--main_process_port", "0"),
]
BASE = {"num-samples": 96, "batch-size": 32, "steps": 6, "solver": "ode-heun", "precision": "fp32"}
CLASSES = 8
BOTH = ["sde", pytest.param("ode-heun", marks=pytest.mark.slow)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What sampling may read, and nothing else: sit_ema/ and vae/."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def make_checkpoint(folder: Path, **changes) -> Path:
    """Random weights everywhere: at its own initialisation a SiT answers zero."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "depth": 2, "num_heads": 2, "align_depth": 1, "encoder_dims": [8]}
    shape |= {"input_size": 8, "num_classes": CLASSES, "projector_dim": 16} | changes
    sit = SiT(**shape)
    for p in sit.parameters():
        torch.nn.init.normal_(p, std=0.2)
    sit.bn.set_stats(torch.full((sit.config.in_channels,), 0.3), torch.tensor(1.5))
    sit.save_pretrained(folder / "sit_ema")
    build_vae("tiny-f2d4").save(folder / "vae")
    return folder


def arguments(checkpoint: Path, out: Path, **flags) -> list[str]:
    flags = BASE | {name.replace("_", "-"): value for name, value in flags.items()}
    words = ["--checkpoint", str(checkpoint), "--out", str(out)]
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def here(checkpoint: Path, out: Path, **flags) -> np.ndarray:
    """Run the script's `main` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", ["sample_ddp.py", *arguments(checkpoint, out, **flags)])
        sample_ddp.main()
    return images_of(out)


def start(words: list[str], ranks: int = 1) -> subprocess.Popen:
    command = [sys.executable, *(LAUNCH if ranks == 2 else []), str(ROOT / "sample_ddp.py"), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def there(checkpoint: Path, out: Path, ranks: int = 1, **flags) -> np.ndarray:
    """Run the real script in processes of its own."""
    process = start(arguments(checkpoint, out, **flags), ranks)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return images_of(out)


def images_of(out: Path) -> np.ndarray:
    with np.load(out, allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        return file["arr_0"]


def record_of(out: Path) -> dict:
    return json.loads(out.with_suffix(".json").read_text())


def assert_same_to_rounding(a: np.ndarray, b: np.ndarray) -> None:
    """At most 1 grey level, on fewer than 1 pixel in 1,000."""
    distance = np.abs(a.astype(int) - b)
    assert a.shape == b.shape and distance.max() <= 1
    assert (distance.max(axis=-1) > 0).mean() < 1e-3


# ---------------------------------------------------------------- ranks, batches, kills


@pytest.mark.parametrize("solver", BOTH)
def test_two_ranks_with_half_the_batch_make_the_same_images(solver, checkpoint, tmp_path):
    flags = {"solver": solver, "cfg_scale": 2.0, "guidance_high": 0.7}
    one = here(checkpoint, tmp_path / "one.npz", **flags)
    two = there(checkpoint, tmp_path / "two.npz", ranks=2, batch_size=16, **flags)
    assert [record_of(tmp_path / f"{name}.npz")["ranks"] for name in ("one", "two")] == [1, 2]
    assert_same_to_rounding(one, two)
    assert one.std() > 10 and len({image.tobytes() for image in one}) == 96


def wait_for_shards(process: subprocess.Popen, folder: Path, least: int, total: int) -> None:
    """Poll until some batches are there; fail if all of them are."""
    while len(list(folder.glob("0*.npy"))) < least:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    assert len(list(folder.glob("0*.npy"))) < total, "too fast to be killed midway"


@pytest.mark.parametrize("solver", BOTH)
def test_kill_and_go_on_is_byte_equal(solver, checkpoint, tmp_path):
    flags = {"num_samples": 90, "batch_size": 4, "steps": 60, "solver": solver, "seed": 3}
    whole, killed = tmp_path / "whole.npz", tmp_path / "killed.npz"
    process = start(arguments(checkpoint, killed, **flags))
    wait_for_shards(process, tmp_path / "killed.shards", 3, 23)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed.shards").glob("0*.npy")}
    assert 3 <= len(kept) < 23 and not killed.exists()
    there(checkpoint, killed, **flags)
    here(checkpoint, whole, **flags)
    assert killed.read_bytes() == whole.read_bytes()
    found, record = record_of(killed), record_of(whole)
    assert found["images_sampled"] == 90 - 4 * len(kept) and record["images_sampled"] == 90
    assert found["settings"] == record["settings"]
    for facts in (found, record):
        assert facts["images_per_second"] == facts["images_sampled"] / facts["seconds"]
    assert not (tmp_path / "killed.shards").exists()


@pytest.mark.slow
def test_a_killed_rank_hangs_nobody_and_one_rank_can_finish(checkpoint, tmp_path):
    flags = {"num_samples": 200, "batch_size": 4, "steps": 60, "solver": "sde"}
    out, whole = tmp_path / "out.npz", tmp_path / "whole.npz"
    launcher = start(arguments(checkpoint, out, **flags), ranks=2)
    wait_for_shards(launcher, tmp_path / "out.shards", 4, 50)
    ranks = [p for p in psutil.Process(launcher.pid).children(recursive=True)
             if "sample_ddp.py" in " ".join(p.cmdline())]  # fmt: skip
    assert len(ranks) == 2
    max(ranks, key=lambda p: int(p.environ()["RANK"])).send_signal(signal.SIGKILL)
    launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and not out.exists()
    there(checkpoint, out, **flags)
    here(checkpoint, whole, **flags)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_an_error_is_said_once_by_two_ranks(checkpoint, tmp_path):
    (tmp_path / "out.npz").write_bytes(b"not ours")
    launcher = start(arguments(checkpoint, tmp_path / "out.npz"), ranks=2)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "out.npz exists" in said[0]


def test_exit_code_of_the_script_and_no_encoder_in_it(checkpoint, tmp_path):
    code = "import sys; sys.argv[0] = 'sample_ddp.py'; import runpy, atexit; atexit.register(lambda: print(sorted(sys.modules))); runpy.run_path('sample_ddp.py', run_name='__main__')"  # fmt: skip # noqa: E501
    words = arguments(checkpoint, tmp_path / "a.npz", steps=0)
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: --steps 0 must be at least 1\n"
    assert "'models.sit'" in done.stdout
    assert not {"'models.encoders'", "'timm'", "'lpips'"} & set(
        done.stdout.strip("[]\n").split(", ")
    )


# ---------------------------------------------------------------- what is written


def test_everything_beside_the_npz(checkpoint, tmp_path):
    out = tmp_path / "new" / "a.b.npz"
    images = here(checkpoint, out, cfg_scale=1.5, guidance_low=0.1, timestep_shift=2)
    assert images.dtype == np.uint8 and images.shape == (96, 16, 16, 3)
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "a.b.json", "a.b.labels.npy", "a.b.npz", "a.b.png",
    ]  # fmt: skip
    with Image.open(out.with_suffix(".png")) as grid:
        top_left = np.asarray(grid)[:64:4, :64:4]
        assert grid.size == (8 * 17 * 4, 8 * 17 * 4)  # one grey pixel after each image
    assert np.array_equal(top_left, images[0])
    settings, record = record_of(out)["settings"], record_of(out)
    chosen = {"cfg_scale": 1.5, "guidance_low": 0.1, "guidance_high": 1.0, "timestep_shift": 2.0}
    chosen |= {"num_samples": 96, "solver": "ode-heun", "steps": 6, "class_balanced": False}
    chosen |= {"seed": 0, "batch_size": 32, "decode_batch_size": 16, "precision": "fp32"}
    chosen |= {"uint8": "round", "compile": False, "tf32": False, "path": "linear"}
    chosen |= {"resolution": 16, "num_classes": CLASSES}
    assert {k: v for k, v in settings.items() if k != "weights"} == chosen
    assert sorted(settings["weights"]) == [
        f"{folder}/{name}" for folder in ("sit_ema", "vae")
        for name in ("config.json", "diffusion_pytorch_model.safetensors")
    ]  # fmt: skip
    assert all(len(digest) == 64 for digest in settings["weights"].values())
    assert record["checkpoint"] == str(checkpoint) and len(record["checkpoint_sha256"]) == 64
    assert {"torch", "diffusers", "numpy", "commit", "python"} <= set(record["versions"])
    assert (record["ranks"], record["device"], record["images_sampled"]) == (1, "cpu", 96)
    assert record["seconds"] > 0


def test_every_flag_is_in_the_settings(checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", *arguments(checkpoint, Path("a.npz"))])
    args = sample_ddp.parse_args()
    names = set(vars(args)) - {"checkpoint", "out", "dry_run"}
    assert names <= set(sample_ddp.resolve(args))


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """Joining 80 batches of 196 kB needs a few batches of memory, not 15 MB."""
    shards = Shards(
        tmp_path / "a.shards", {"num_samples": 1278, "batch_size": 16, "resolution": 64}
    )
    shards.open()
    for index in range(len(shards)):
        images = np.full((len(shards.indices(index)), 64, 64, 3), index, np.uint8)
        shards.write(index, images)
    tracemalloc.start()
    shards.write_npz(tmp_path / "a.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 16 * 64 * 64 * 3
    images = images_of(tmp_path / "a.npz")
    assert images.shape == (1278, 64, 64, 3)
    assert np.array_equal(images[:, 0, 0, 0], np.arange(1278) // 16)


def test_dry_run_writes_nothing(checkpoint, tmp_path, capsys):
    with pytest.raises(FileNotFoundError):
        here(checkpoint, tmp_path / "a.npz", dry_run=True)
    assert json.loads(capsys.readouterr().out)["steps"] == 6
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- images


def test_seeds_share_no_image(checkpoint, tmp_path):
    both = [here(checkpoint, tmp_path / f"{seed}.npz", seed=seed) for seed in (0, 1)]
    assert len({image.tobytes() for images in both for image in images}) == 2 * 96


def test_more_samples_begin_with_the_same_images(checkpoint, tmp_path):
    few = here(checkpoint, tmp_path / "few.npz", num_samples=32, solver="sde")
    many = here(checkpoint, tmp_path / "many.npz", num_samples=40, solver="sde")
    assert np.array_equal(few, many[:32])


def test_uint8_rules(checkpoint, tmp_path):
    """Truncation is the floor of what rounding rounds: half a grey level darker on average."""
    rounded = here(checkpoint, tmp_path / "r.npz").astype(int)
    truncated = here(checkpoint, tmp_path / "t.npz", uint8="truncate").astype(int)
    assert set(np.unique(rounded - truncated)) == {0, 1}
    assert (rounded - truncated).mean() == pytest.approx(0.5, abs=0.05)


def test_decode_chunks_do_not_change_images(checkpoint, tmp_path):
    whole = here(checkpoint, tmp_path / "w.npz", decode_batch_size=32)
    assert_same_to_rounding(whole, here(checkpoint, tmp_path / "c.npz", decode_batch_size=5))


def test_the_image_is_the_decoded_denormalised_latent(checkpoint, tmp_path):
    """The order of method.md, repeated here for one image from its own noise."""
    from diffusers import AutoencoderKL

    from utils.draws import generator
    from utils.samplers import sample

    out = tmp_path / "a.npz"
    images = here(checkpoint, out, num_samples=3, uint8="truncate")
    sit = SiT.from_pretrained(checkpoint / "sit_ema").eval()
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae").eval()
    noise = torch.randn(1, 4, 8, 8, generator=generator("sample", 0, 2))
    y = torch.from_numpy(np.load(out.with_suffix(".labels.npy"))[2:])
    with torch.no_grad():
        z_n = sample(sit, noise, y, solver="ode-heun", steps=6)
        z = z_n * (1.5**2 + 1e-4) ** 0.5 + 0.3
        pixels = ((vae.decode(z).sample + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
    assert_same_to_rounding(images[2:], pixels.permute(0, 2, 3, 1).numpy())


def test_bf16_stays_near_fp32(checkpoint, tmp_path):
    exact = here(checkpoint, tmp_path / "a.npz").astype(float)
    half = here(checkpoint, tmp_path / "b.npz", precision="bf16").astype(float)
    assert 0 < np.abs(exact - half).mean() < 0.1 * exact.std()


def test_weights_that_make_no_numbers_are_refused(tmp_path):
    make_checkpoint(tmp_path)
    file = tmp_path / "sit_ema" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["final_layer.linear.bias"].fill_(float("nan"))
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"images 0\.\.31 are not finite"):
        here(tmp_path, tmp_path / "a.npz")


# ---------------------------------------------------------------- labels


def test_balanced_labels_are_exactly_balanced(checkpoint, tmp_path):
    out = tmp_path / "a.npz"
    here(checkpoint, out, class_balanced=True)
    y = np.load(out.with_suffix(".labels.npy"))
    assert np.bincount(y, minlength=CLASSES).tolist() == [96 // CLASSES] * CLASSES
    for part in np.split(y, 4):  # no split of the Inception Score sees a sorted file
        assert len(set(part)) == CLASSES


def test_random_labels_depend_on_seed_and_index_alone(checkpoint, tmp_path):
    def draw(seed, rows):
        return draw_labels(Sampling(seed=seed), rows, 1000)

    y = draw(0, range(4000))
    assert torch.equal(torch.cat([draw(0, range(i, i + 100)) for i in range(0, 4000, 100)]), y)
    assert (y == draw(1, range(4000))).float().mean() < 0.01
    assert y.min() >= 0 and y.max() < 1000 and len(set(y.tolist())) > 950
    assert float(y.float().mean()) == pytest.approx(499.5, abs=20)
    here(checkpoint, tmp_path / "a.npz", num_samples=32)
    here(checkpoint, tmp_path / "b.npz", num_samples=64, batch_size=64, steps=2, solver="sde")
    a, b = (np.load(tmp_path / f"{name}.labels.npy") for name in "ab")
    assert np.array_equal(a, b[:32])


def test_labels_reach_the_network(checkpoint, tmp_path):
    """Under guidance as without: other labels, other images."""
    one = here(checkpoint, tmp_path / "a.npz", class_balanced=True)
    other = here(checkpoint, tmp_path / "b.npz")
    y = np.load(tmp_path / "b.labels.npy")
    same = np.array([np.array_equal(p, q) for p, q in zip(one, other)])
    assert np.array_equal(same, y == np.arange(96) % CLASSES)


# ---------------------------------------------------------------- finished, unfinished, foreign


def test_finished_work_is_not_done_again(checkpoint, tmp_path, capsys, monkeypatch):
    out = tmp_path / "a.npz"
    here(checkpoint, out)
    before = out.stat().st_mtime_ns
    (tmp_path / "a.shards").mkdir()  # killed while it was cleaning up
    monkeypatch.setattr(sample_ddp, "load_networks", None)
    here(checkpoint, out)
    assert "has these 96 images already" in capsys.readouterr().out
    assert out.stat().st_mtime_ns == before and not (tmp_path / "a.shards").exists()


def test_an_npz_of_other_settings_is_never_overwritten(checkpoint, tmp_path):
    out = tmp_path / "a.npz"
    here(checkpoint, out)
    for flags, words in [
        ({"seed": 1}, "seed 0, now 1"),
        ({"solver": "ode-euler"}, "solver ode-heun, now ode-euler"),
        ({"uint8": "truncate"}, "uint8 round, now truncate"),
        (
            {"cfg_scale": 2, "guidance_high": 0.5},
            "cfg_scale 1.0, now 2.0, guidance_high 1.0, now 0.5",
        ),
    ]:
        with pytest.raises(UserError, match=f"of other settings .{words}.: choose another"):
            here(checkpoint, out, **flags)
    other = make_checkpoint(tmp_path / "other", depth=3)
    with pytest.raises(UserError, match=r"\(weights differ\)"):
        here(other, out)
    out.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="no readable record tells"):
        here(checkpoint, out)
    assert not (tmp_path / "a.shards").exists()


def interrupted(checkpoint, out, monkeypatch, **flags) -> Shards:
    """A run that ends after its batches, before they are joined."""
    with monkeypatch.context() as patch:
        patch.setattr(sample_ddp, "finish", lambda *_: None)
        with pytest.raises(FileNotFoundError):
            here(checkpoint, out, **flags)
    folder = out.with_suffix(".shards")
    return Shards(folder, json.loads((folder / "settings.json").read_text())["settings"])


def test_batches_of_other_settings_are_refused(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "a.npz"
    shards = interrupted(checkpoint, out, monkeypatch)
    with pytest.raises(
        UserError, match=r"a.shards holds samples of other settings .steps 6, now 7"
    ):
        here(checkpoint, out, steps=7)
    (shards.folder / "settings.json").unlink()
    with pytest.raises(UserError, match=r"a.shards holds samples of other settings"):
        here(checkpoint, out)


def test_a_kill_between_the_npz_and_its_record_is_mended(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "a.npz"
    shards = interrupted(checkpoint, out, monkeypatch)
    shards.write_npz(out)
    content = out.read_bytes()
    here(checkpoint, out)
    assert out.read_bytes() == content
    record = record_of(out)
    assert (record["images_sampled"], record["images_per_second"]) == (0, None)
    assert not shards.folder.exists()


def test_the_record_of_a_deleted_npz_is_not_taken_for_that_of_the_next(
    checkpoint, tmp_path, monkeypatch
):
    out = tmp_path / "a.npz"
    here(checkpoint, out)
    out.unlink()

    def ctrl_c(*_):  # not a real SIGINT: a shell's background jobs ignore it
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample_ddp, "save_grid", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            here(checkpoint, out, seed=1)
    assert out.exists() and not out.with_suffix(".json").exists()
    here(checkpoint, out, seed=1)
    assert record_of(out)["settings"]["seed"] == 1


def test_damaged_and_foreign_batches_are_made_again(checkpoint, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.npz"
    expected = here(checkpoint, tmp_path / "b.npz", batch_size=16)
    shards = interrupted(checkpoint, out, monkeypatch, batch_size=16)
    capsys.readouterr()
    content = shards.file(0).read_bytes()
    shards.file(0).write_bytes(content[:-1])
    shards.file(1).write_bytes(b"")
    shards.file(2).write_bytes(content + b"x")
    np.save(shards.file(3), np.zeros((16, 16, 16, 3), np.float32))
    np.save(shards.file(4), np.zeros((16, 8, 8, 3), np.uint8))
    (shards.folder / "000005.tmp").write_bytes(b"half a batch")
    assert np.array_equal(here(checkpoint, out, batch_size=16), expected)
    assert capsys.readouterr().out.count("is damaged: made again") == 5
    assert record_of(out)["images_sampled"] == 5 * 16


# ---------------------------------------------------------------- mistakes

WRONG = {
    "num_samples=0": "--num-samples 0 must be at least 1",
    "batch_size=-1": "--batch-size -1 must be at least 1",
    "decode_batch_size=0": "--decode-batch-size 0 must be at least 1",
    "steps=0": "--steps 0 must be at least 1",
    "steps=x": "argument --steps: invalid int value: 'x'",
    "solver=euler": "argument --solver: invalid choice: 'euler'",
    "precision=fp16": "argument --precision: invalid choice",
    "uint8=floor": "argument --uint8: invalid choice",
    "cfg_scale=nan": "--cfg-scale nan must be a number from 0",
    "cfg_scale=-1": "--cfg-scale -1.0 must be a number from 0",
    "guidance_low=0.8 guidance_high=0.3": "must be an interval inside [0, 1]",
    "guidance_high=1.5": "must be an interval inside [0, 1]",
    "timestep_shift=0": "--timestep-shift 0.0 must be a positive number",
    "timestep_shift=inf": "--timestep-shift inf must be a positive number",
    "solver=sde steps=1": "--solver sde needs --steps 2 or more",
    "num_samples=97 class_balanced=": "does not split evenly over 8 classes",
    "out=a.png": "--out a.png must end in .npz",
    "checkpoint=nowhere": "--checkpoint nowhere has no sit_ema/",
    "stepz=3": "unrecognized arguments: --stepz 3",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_mistake_ends_in_one_line_and_exit_code_2(
    flags, checkpoint, tmp_path, capsys, monkeypatch
):
    pairs = [flag.split("=") for flag in flags.split()]
    given = {"checkpoint": checkpoint, "out": tmp_path / "a.npz"} | {k: v or True for k, v in pairs}
    words = arguments(**given)
    monkeypatch.setattr(sys, "argv", ["sample_ddp.py", *words])
    with pytest.raises(SystemExit) as end:
        cli.run(sample_ddp.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith("error: ") and WRONG[flags] in line
    assert not list(tmp_path.iterdir())


def test_guidance_needs_a_null_label(tmp_path):
    make_checkpoint(tmp_path, class_dropout_prob=0.0)
    with pytest.raises(UserError, match="trained without a null label"):
        here(tmp_path, tmp_path / "a.npz", cfg_scale=2)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="latents of 5 channels, vae/ decodes 4"):
        here(make_checkpoint(tmp_path / "a", in_channels=5), tmp_path / "a.npz")
    broken = make_checkpoint(tmp_path / "b")
    file = broken / "sit_ema" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["blocks.1.mlp.fc1.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing keys .'blocks.1.mlp.fc1.bias'"):
        here(broken, tmp_path / "b.npz")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot load"):
        here(broken, tmp_path / "c.npz")
    file.unlink()
    with pytest.raises(UserError, match="cannot load"):
        here(broken, tmp_path / "d.npz")


def test_state_json_gives_the_path_and_vouches_for_the_weights(tmp_path):
    make_checkpoint(tmp_path)
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"path": "cosine", "files": {}}))
    here(tmp_path, tmp_path / "a.npz", num_samples=2)
    assert record_of(tmp_path / "a.npz")["settings"]["path"] == "cosine"
    here(tmp_path, tmp_path / "b.npz", num_samples=2, path="linear")
    assert record_of(tmp_path / "b.npz")["settings"]["path"] == "linear"
    state.write_text(json.dumps({"files": {"vae/config.json": "0" * 64}}))
    with pytest.raises(UserError, match=r"vae/config.json is not as it was saved"):
        here(tmp_path, tmp_path / "c.npz")
