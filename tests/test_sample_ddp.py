"""sample_ddp.py: the same images for any number of ranks, any batch size, and after a kill.

    python -m pytest tests/test_sample_ddp.py        (CPU, no network; 2 ranks over gloo)

Kills and exit codes are tried on the real script in processes of its own, ranks there (slow) and
here, one after the other; the rest calls its `main` here. `accelerate launch --cpu --num_processes
2` starts one process only (accelerate 1.15), hence `--multi_gpu`, which on a machine without GPUs
makes CPU ranks.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample_ddp
from models.checks.errors import UserError
from models.sit import SiT
from models.vae import build_vae
from utils import cli, precision
from utils.data.sharded import ShardedFolder
from utils.evaluation.images.image_sets import open_images
from utils.sampling import load, output
from utils.sampling.output import SampleFiles
from utils.sampling.settings import ADDED

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--main_process_port", "0"),
]
BASE = {"num-samples": 96, "batch-size": 32, "steps": 6, "solver": "ode-heun", "precision": "fp32"}
CLASSES = 8
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
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def here(checkpoint: Path, out: Path, **flags) -> np.ndarray:
    """Run the script's `main` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", ["sample_ddp.py", *arguments(checkpoint, out, **flags)])
        sample_ddp.main()
    return images_of(out)


def start(words: list[str], ranks: int = 1, log=subprocess.PIPE) -> subprocess.Popen:
    """The real script in processes of its own; into a log file go all imports, too."""
    python = [sys.executable, *(["-X", "importtime"] if log is not subprocess.PIPE else [])]
    command = [*python, *(LAUNCH if ranks == 2 else []), str(ROOT / "sample_ddp.py"), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=log, text=True
    )


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


@pytest.fixture
def small_blocks(monkeypatch):
    """Six blocks of 16 images; a process of its own would have blocks of 100."""
    monkeypatch.setattr(output, "BLOCK", 16)


# ---------------------------------------------------------------- ranks, batches, kills


@pytest.mark.parametrize("solver", ["sde", "ode-heun"])
def test_ranks_share_the_blocks(solver, small_blocks, checkpoint, tmp_path, monkeypatch):
    """Two ranks, played one after the other, make the bytes that one makes."""
    flags = {"solver": solver, "cfg_scale": 2.0, "num_samples": 40, "batch_size": 8}
    if solver == "sde":  # also of chosen classes, as single images
        flags |= {"classes": "5,3", "png": tmp_path / "png"}
    here(checkpoint, tmp_path / "one.npz", **flags)
    flags |= {"png": tmp_path / "again"} if "png" in flags else {}
    files = prepared(checkpoint, tmp_path / "two.npz", monkeypatch, **flags)
    settings, todo = files.checkpoint.settings, files.begin()
    nets = load.load_networks(checkpoint, settings, torch.device("cpu"))
    for rank in (1, 0):
        ranks = SimpleNamespace(rank=rank, world=2, is_main=rank == 0, device=torch.device("cpu"))
        sample_ddp.make_blocks(files, nets, todo, ranks)
        assert files.blocks.unfinished() == ([0, 2] if rank else [])
    files.finish({}, sample_ddp.save_samples)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    for file in (tmp_path / "png").glob("*"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def prepared(checkpoint: Path, out: Path, monkeypatch, **flags) -> SampleFiles:
    """The files of a command, as its main process prepares them; nothing is sampled."""
    args = sample_ddp.parse_args(arguments(checkpoint, out, **flags))
    return sample_ddp.prepare(args, torch.device("cpu"))[0]


@pytest.mark.slow
def test_two_ranks_with_half_the_batch_make_the_same_images(checkpoint, tmp_path):
    flags = {"solver": "sde", "cfg_scale": 2.0, "guidance_high": 0.7, "num_samples": 240}
    flags |= {"classes": "3,1,6"}
    one = here(checkpoint, tmp_path / "one.npz", png=tmp_path / "a", **flags)
    more = {"ranks": 2, "batch_size": 16, "png": tmp_path / "b"}
    two = there(checkpoint, tmp_path / "two.npz", **more, **flags)
    assert_same_to_rounding(two, pngs_of(tmp_path / "b"))
    assert (tmp_path / "a/labels.csv").read_bytes() == (tmp_path / "b/labels.csv").read_bytes()
    assert [record_of(tmp_path / f"{name}.npz")["ranks"] for name in ("one", "two")] == [1, 2]
    assert_same_to_rounding(one, two)
    assert one.std() > 10 and len({image.tobytes() for image in one}) == 240


def wait_for_blocks(process: subprocess.Popen, folder: Path, least: int, total: int) -> None:
    """Poll until some blocks are there; fail if all of them are."""
    while len(list(folder.glob("shard-*.json"))) < least:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    assert len(list(folder.glob("shard-*.json"))) < total, "too fast to be killed midway"


@pytest.mark.slow
def test_a_killed_run_is_continued_byte_by_byte(checkpoint, tmp_path):
    """And the real script imports no encoder: its process says what it imports."""
    flags = {"num_samples": 390, "batch_size": 20, "steps": 20, "solver": "sde", "seed": 3}
    whole, killed, log = tmp_path / "whole.npz", tmp_path / "killed.npz", tmp_path / "log.txt"
    with log.open("w") as file:
        process = start(arguments(checkpoint, killed, **flags), log=file)
        wait_for_blocks(process, tmp_path / "killed.shards", 1, 4)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = len(list((tmp_path / "killed.shards").glob("shard-*.json")))
    assert 1 <= kept < 4 and not killed.exists()
    here(checkpoint, killed, **flags)
    here(checkpoint, whole, **flags)
    assert killed.read_bytes() == whole.read_bytes()
    found, record = record_of(killed), record_of(whole)
    assert found["images_sampled"] == 390 - 100 * kept and record["images_sampled"] == 390
    assert found["settings"] == record["settings"]
    for facts in (found, record):
        assert facts["images_per_second"] == facts["images_sampled"] / facts["seconds"]
    assert not (tmp_path / "killed.shards").exists()
    modules = {line.split("|")[-1].strip() for line in log.read_text().splitlines()}
    assert "models.sit" in modules and not {"models.encoders", "timm", "lpips"} & modules


def killed_after(blocks: int, checkpoint: Path, out: Path, **flags) -> None:
    """A run that ends when so many blocks are finished."""
    begin, begun = sample_ddp.begin_images, []

    def begin_or_die(*args):
        if len(begun) == blocks:
            raise KeyboardInterrupt
        begun.append(begin(*args))
        return begun[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_ddp, "begin_images", begin_or_die)
        with pytest.raises(KeyboardInterrupt):
            here(checkpoint, out, **flags)


def test_an_interrupted_ode_is_continued_byte_by_byte(small_blocks, checkpoint, tmp_path):
    killed_after(3, checkpoint, tmp_path / "a.npz")
    here(checkpoint, tmp_path / "a.npz")
    here(checkpoint, tmp_path / "b.npz")
    assert record_of(tmp_path / "a.npz")["images_sampled"] == 96 - 3 * 16
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_run_is_continued_with_another_batch_size(small_blocks, checkpoint, tmp_path):
    """As after running out of memory: what is there is kept, the rest is the same images."""
    out, flags = tmp_path / "a.npz", {"solver": "sde", "cfg_scale": 1.5}
    killed_after(2, checkpoint, out, batch_size=64, decode_batch_size=16, **flags)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "a.shards").glob("images-*.npy")}
    assert len(kept) == 2
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        begin = sample_ddp.begin_images
        patch.setattr(sample_ddp, "begin_images", lambda *a: (drawn.append(a[3]), begin(*a))[1])
        images = here(checkpoint, out, batch_size=5, decode_batch_size=3, **flags)
    assert drawn == [range(start, start + 16) for start in (32, 48, 64, 80)]
    assert record_of(out)["images_sampled"] == 64
    assert (record_of(out)["batch_size"], record_of(out)["decode_batch_size"]) == (5, 3)
    assert_same_to_rounding(images, here(checkpoint, tmp_path / "b.npz", **flags))


def test_another_rule_of_the_noise_is_refused(small_blocks, checkpoint, tmp_path, monkeypatch):
    """Neither half a set nor a whole one of the old rule is taken for one of the new."""
    killed_after(1, checkpoint, tmp_path / "half.npz")
    here(checkpoint, tmp_path / "whole.npz")
    monkeypatch.setattr(load, "NOISE_VERSION", 3)
    for name in ("half", "whole"):
        with pytest.raises(UserError, match="noise_version=2, now 3"):
            here(checkpoint, tmp_path / f"{name}.npz")


@pytest.mark.slow
def test_a_killed_rank_hangs_nobody_and_one_rank_can_finish(checkpoint, tmp_path):
    flags = {"num_samples": 790, "batch_size": 20, "steps": 20, "solver": "sde"}
    out, whole = tmp_path / "out.npz", tmp_path / "whole.npz"
    launcher = start(arguments(checkpoint, out, **flags), ranks=2)
    wait_for_blocks(launcher, tmp_path / "out.shards", 2, 8)
    ranks = [p for p in psutil.Process(launcher.pid).children(recursive=True)
             if "sample_ddp.py" in " ".join(p.cmdline())]  # fmt: skip
    assert len(ranks) == 2
    max(ranks, key=lambda p: int(p.environ()["RANK"])).send_signal(signal.SIGKILL)
    launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and not out.exists()
    here(checkpoint, out, **flags)
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


def test_exit_code_of_the_script(checkpoint, tmp_path):
    """A wrong flag is answered before torch is imported."""
    words = [str(ROOT / "sample_ddp.py"), *arguments(checkpoint, tmp_path / "a.npz", steps=0)]
    done = subprocess.run([sys.executable, "-X", "importtime", *words], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    (said,) = (line for line in lines if "import time:" not in line)
    assert said.startswith("error: ") and "--steps" in said
    assert not any(line.endswith(" torch") for line in lines)


# ---------------------------------------------------------------- what is written


def test_everything_beside_the_npz(checkpoint, tmp_path):
    out = tmp_path / "new" / "a.b.npz"
    images = here(checkpoint, out, cfg_scale=1.5, guidance_low=0.1, timestep_shift=2)
    assert images.dtype == np.uint8 and images.shape == (96, 16, 16, 3)
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "a.b.json", "a.b.labels.npy", "a.b.npz", "a.b.png",
    ]  # fmt: skip
    with Image.open(out.with_suffix(".png")) as grid:
        assert is_in(grid, images[0]) and is_in(grid, images[63]) and not is_in(grid, images[64])
    settings, record = record_of(out)["settings"], record_of(out)
    chosen = {"cfg_scale": 1.5, "guidance_low": 0.1, "guidance_high": 1.0, "timestep_shift": 2.0}
    chosen |= {"num_samples": 96, "solver": "ode-heun", "steps": 6, "class_balanced": False}
    chosen |= {"seed": 0, "precision": "fp32", "uint8": "round", "compile": False, "tf32": False}
    chosen |= {"path": "linear", "noise_version": 2, "decode_precision": "fp32"}
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
    found = open_images(out)
    assert found.record == record and record["content_sha256"] == found.fingerprint()
    names = set(vars(sample_ddp.parse_args(arguments(checkpoint, out))))
    names -= {"out", "dry_run", "list", "png", "preset"}
    names -= {*ADDED, "per_class"}  # on record where they are given
    assert names <= {*settings, *record}  # every flag is on record


def test_guidance_as_other_samplers_have_it_reaches_the_images_and_the_record(checkpoint, tmp_path):
    flags = {"num_samples": 4, "steps": 4, "cfg_scale": 3, "guidance_high": 0.6}
    plain = here(checkpoint, tmp_path / "plain.npz", **flags)
    assert not ADDED.keys() & record_of(tmp_path / "plain.npz")["settings"].keys()
    for name, value in {"cfg_channels": 3, "heun_guidance": "predictor"}.items():
        out = tmp_path / f"{name}.npz"
        assert not np.array_equal(plain, here(checkpoint, out, **flags, **{name: value}))
        assert record_of(out)["settings"][name] == value


def is_in(picture: Image.Image, image: np.ndarray) -> bool:
    """Whether an enlarged copy of an image (16, 16, 3), with all its pixels, is in a picture."""
    pixels, scale = np.asarray(picture), 96 // 16
    rows, columns = np.nonzero((pixels == image[0, 0]).all(-1))
    for row, column in zip(rows, columns):
        part = pixels[row : row + 96 : scale, column : column + 96 : scale]
        if np.array_equal(part, image):
            return True
    return False


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
    few = here(checkpoint, tmp_path / "few.npz", num_samples=32, batch_size=16, solver="sde")
    many = here(checkpoint, tmp_path / "many.npz", num_samples=48, batch_size=16, solver="sde")
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
    """The steps of sampling, repeated here for one image from its own noise."""
    from diffusers import AutoencoderKL

    from utils.samplers import sample
    from utils.sampling.noise import ImageNoise

    out = tmp_path / "a.npz"
    images = here(checkpoint, out, num_samples=3, uint8="truncate")
    sit = SiT.from_pretrained(checkpoint / "sit_ema").eval()
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae").eval()
    noise = ImageNoise(0, range(2, 3)).start(4, 8, 8)
    y = torch.from_numpy(np.load(out.with_suffix(".labels.npy"))[2:])
    with torch.no_grad():
        z_n = sample(sit, noise, y, solver="ode-heun", steps=6)
        z = z_n * (1.5**2 + 1e-4) ** 0.5 + 0.3
        pixels = ((vae.decode(z).sample + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
    assert_same_to_rounding(images[2:], pixels.permute(0, 2, 3, 1).numpy())


@pytest.mark.usefixtures("native_halves")
def test_bf16_stays_near_fp32(checkpoint, tmp_path, monkeypatch):
    """The SiT's share and the decoder's; on record, too."""
    monkeypatch.setattr(precision, "cpu_has", lambda _: True)
    few = {"num_samples": 16, "batch_size": 16}
    exact = here(checkpoint, tmp_path / "a.npz", **few).astype(float)
    for name, most in (("precision", 0.1), ("decode_precision", 0.05)):
        half = here(checkpoint, tmp_path / f"{name}.npz", **few, **{name: "bf16"}).astype(float)
        assert 0 < np.abs(exact - half).mean() < most * exact.std()
        assert record_of(tmp_path / f"{name}.npz")["settings"][name] == "bf16"


def test_a_cpu_without_bf16_takes_fp32_and_says_so(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "cpu_has", lambda name: name == "fp32")
    few = {"num_samples": 4, "precision": "bf16", "decode_precision": "bf16"}
    here(checkpoint, tmp_path / "a.npz", **few)
    lines = [line for line in capsys.readouterr().out.splitlines() if "no native" in line]
    assert [line.split(":")[0] for line in lines] == ["--precision bf16", "--decode-precision bf16"]
    settings = record_of(tmp_path / "a.npz")["settings"]
    assert (settings["precision"], settings["decode_precision"]) == ("fp32", "fp32")


def test_an_error_of_the_writer_ends_the_program(small_blocks, checkpoint, tmp_path, monkeypatch):
    """Blocks written before it are kept, and the same command goes on with them."""
    seal, sealed = ShardedFolder.seal, []

    def seal_or_fail(blocks, block, *args):
        if len(sealed) == 2:
            raise UserError("cannot write: No space left on device")
        seal(blocks, block, *args)
        sealed.append(block)

    with monkeypatch.context() as patch:
        patch.setattr(ShardedFolder, "seal", seal_or_fail)
        with pytest.raises(UserError, match="No space left on device"):
            here(checkpoint, tmp_path / "a.npz")
    assert sealed == [0, 1] and not (tmp_path / "a.npz").exists()
    here(checkpoint, tmp_path / "a.npz")
    assert record_of(tmp_path / "a.npz")["images_sampled"] == 96 - 2 * 16


def test_weights_that_make_no_numbers_are_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "c")
    file = folder / "sit_ema" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["final_layer.linear.bias"].fill_(3e38)  # finite, but its sums are not
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"images 0\.\.31 are not finite"):
        here(folder, tmp_path / "a.npz")


# ---------------------------------------------------------------- labels


def test_balanced_labels_are_exactly_balanced(checkpoint, tmp_path):
    out = tmp_path / "a.npz"
    here(checkpoint, out, class_balanced=True)
    y = np.load(out.with_suffix(".labels.npy"))
    assert np.bincount(y, minlength=CLASSES).tolist() == [96 // CLASSES] * CLASSES
    for part in np.split(y, 4):  # no split of the Inception Score sees a sorted file
        assert len(set(part)) == CLASSES


def test_random_labels_are_those_of_the_same_indices(checkpoint, tmp_path):
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


# ---------------------------------------------------------------- chosen classes, single images

NAMES = {"0": "tench, Tinca tinca", "1": "goldfish", "5": "otter"}


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """An exported pipeline: its model_index.json knows classes and the path, there is no state."""
    folder = make_checkpoint(tmp_path_factory.mktemp("named"))
    index = {"_class_name": "RepaePipeline", "path": "cosine", "id2label": NAMES}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def pngs_of(folder: Path) -> np.ndarray:
    """All single images of --png in their order, (N, H, W, 3)."""
    names = sorted(path.name for path in folder.glob("*.png"))
    assert names == [f"{i:06d}.png" for i in range(len(names))]
    return np.stack([np.asarray(Image.open(folder / name)) for name in names])


def test_chosen_classes_follow_each_other_and_more_of_each_begin_with_the_same(named, tmp_path):
    few = {"num_samples": None, "classes": "otter,3,Tinca_tinca", "steps": 2}
    a = here(named, tmp_path / "a.npz", per_class=2, **few)
    b = here(named, tmp_path / "b.npz", per_class=4, **few)
    assert len(a) == 6 and len(b) == 12 and np.array_equal(a, b[:6])
    assert np.load(tmp_path / "b.labels.npy").tolist() == [5, 3, 0] * 4
    record = record_of(tmp_path / "b.npz")
    assert record["settings"]["classes"] == [5, 3, 0] and record["settings"]["path"] == "cosine"
    assert record["class_names"] == ["otter", "class 3", "tench"]
    with Image.open(tmp_path / "b.png") as grid:
        assert 3 * 96 < grid.height < 3 * 110  # a row of four for each
        assert all(is_in(grid, image) for image in b)
    here(named, tmp_path / "a.npz", per_class=2, **few)  # these are on disk
    with pytest.raises(UserError, match=r"classes=\[5, 3, 0\], now \[5, 0, 3\]"):
        here(named, tmp_path / "b.npz", per_class=4, **few | {"classes": "5,0,3"})


def test_settings_without_chosen_classes_have_the_hash_that_they_had():
    """Records of samples from before there was a choice are still those of the same settings."""
    settings = load.SamplingSettings(path="linear")
    known = load.SampledCheckpoint(Path("a"), settings, 16, 8, {"vae/x": "0" * 64}).identity(9)
    assert "classes" not in known and output.hash_settings(known).startswith("315a707f7da69313")


def test_each_image_as_a_png_with_its_label(named, tmp_path, small_blocks, monkeypatch, capsys):
    """Beside the .npz, after a kill, and from an .npz that is there already."""
    folder, few = tmp_path / "new/png", {"num_samples": 40, "steps": 2}
    killed_after(1, named, tmp_path / "a.npz", png=folder, **few)
    assert len(list(folder.glob("*.png"))) == 16 and not (folder / "labels.csv").exists()
    kept = (folder / "000003.png").stat().st_mtime_ns
    (folder / "000004.png").unlink()  # by hand
    images = here(named, tmp_path / "a.npz", png=folder, **few)
    assert np.array_equal(pngs_of(folder), images)
    assert (folder / "000003.png").stat().st_mtime_ns == kept
    head, *rows = (folder / "labels.csv").read_text().splitlines()
    y = np.load(tmp_path / "a.labels.npy").tolist()
    titles = {0: "tench", 1: "goldfish", 5: "otter"}
    assert head == "file,label,class"
    assert rows == [f"{i:06d}.png,{k},{titles.get(k, f'class {k}')}" for i, k in enumerate(y)]

    monkeypatch.setattr(sample_ddp, "load_networks", None)  # nothing is sampled from here on
    here(named, tmp_path / "a.npz", png=tmp_path / "later", **few)
    assert np.array_equal(pngs_of(tmp_path / "later"), images)
    here(named, tmp_path / "a.npz", png=tmp_path / "later", **few)
    assert capsys.readouterr().out.splitlines()[-1].endswith("nothing to do")
    with pytest.raises(UserError, match=r"--png: .*begun with .*seed=0, now 1"):
        here(named, tmp_path / "c.npz", png=folder, **few, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/cat.png").touch()
    with pytest.raises(UserError, match=r"--png: .*mine holds other files \(cat.png\)"):
        here(named, tmp_path / "c.npz", png=tmp_path / "mine", **few)
    assert not (tmp_path / "c.npz").exists() and not (tmp_path / "c.shards").exists()


def test_png_alone_names_the_npz(tmp_path):
    words = ["--checkpoint", "a", "--png", str(tmp_path / "cats.d")]
    assert sample_ddp.parse_args(words).out == tmp_path / "cats.d.npz"
    with pytest.raises(UserError, match="--png /: name a folder in it"):
        sample_ddp.parse_args([*words[:3], "/"])
    with pytest.raises(UserError, match=r"name what to write: --out NAME.npz, or --png DIR"):
        sample_ddp.parse_args(words[:2])


def test_the_list_of_checkpoints_needs_no_output(tmp_path, monkeypatch, capsys):
    words = ["sample_ddp.py", "--checkpoint", str(tmp_path), "--list"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "checkpoints").mkdir()
    sample_ddp.main()
    assert capsys.readouterr().out == f"{tmp_path} holds no whole checkpoint\n"


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
    content = bytearray(out.read_bytes())
    content[len(content) // 2] ^= 1  # one pixel, in place
    out.write_bytes(content)
    with pytest.raises(UserError, match="other images than its record says"):
        here(checkpoint, out)


def test_an_npz_of_other_settings_is_never_overwritten(checkpoint, tmp_path):
    out = tmp_path / "a.npz"
    here(checkpoint, out)
    for flags, words in [
        ({"seed": 1}, "seed=0, now 1"),
        ({"solver": "ode-euler"}, "solver=ode-heun, now ode-euler"),
        ({"uint8": "truncate"}, "uint8=round, now truncate"),
        ({"cfg_channels": 3}, "cfg_channels=null, now 3"),
        (
            {"cfg_scale": 2, "guidance_high": 0.5},
            "cfg_scale=1.0, now 2.0, guidance_high=1.0, now 0.5",
        ),
    ]:
        with pytest.raises(UserError, match=f"of other settings .{words}.: choose another"):
            here(checkpoint, out, **flags)
    other = make_checkpoint(tmp_path / "other", depth=3)
    with pytest.raises(UserError, match=r"other settings \(weights=\w+\.*, now \w+\.*\)"):
        here(other, out)
    out.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="no readable record says"):
        here(checkpoint, out)
    assert not (tmp_path / "a.shards").exists()


@pytest.mark.parametrize("name", ["a.json", "a.png", "a.labels.npy", "a.shards/x.txt"])
def test_what_is_not_ours_beside_the_npz_is_kept(name, checkpoint, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"settings": 1}')
    with pytest.raises(UserError, match=rf"{name.split('/')[0]} (exists and is not|holds other)"):
        here(checkpoint, tmp_path / "a.npz", dry_run=True)
    assert file.read_text() == '{"settings": 1}'
    with pytest.raises(UserError, match="lies inside the input"):
        here(checkpoint, checkpoint / "a.npz", dry_run=True)


def interrupted(checkpoint, out, monkeypatch, **flags) -> SampleFiles:
    """A run that ends after its blocks, before they are joined."""
    with monkeypatch.context() as patch:
        patch.setattr(SampleFiles, "finish", lambda *_: None)
        with pytest.raises(FileNotFoundError):
            here(checkpoint, out, **flags)
    return prepared(checkpoint, out, monkeypatch, **flags)


def test_blocks_of_other_settings_are_refused(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "a.npz"
    files = interrupted(checkpoint, out, monkeypatch)
    with pytest.raises(UserError, match=r"a\.shards was begun with steps=6, now 7"):
        here(checkpoint, out, steps=7)
    (files.blocks.folder / "plan.json").unlink()
    with pytest.raises(UserError, match=r"a\.shards holds other files.*or delete that folder"):
        here(checkpoint, out)


def test_a_kill_between_the_npz_and_its_record_is_mended(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "a.npz"
    expected = here(checkpoint, tmp_path / "b.npz")
    files = interrupted(checkpoint, out, monkeypatch)
    out.write_bytes((tmp_path / "b.npz").read_bytes())
    assert np.array_equal(here(checkpoint, out), expected)
    record = record_of(out)
    assert (record["images_sampled"], record["images_per_second"]) == (0, None)
    assert not files.blocks.folder.exists()


def test_the_record_of_a_deleted_npz_is_not_taken_for_that_of_the_next(
    checkpoint, tmp_path, monkeypatch
):
    out = tmp_path / "a.npz"
    here(checkpoint, out)
    out.unlink()

    def ctrl_c(*_):  # not a real SIGINT: a shell's background jobs ignore it
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample_ddp, "save_samples", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            here(checkpoint, out, seed=1)
    assert out.exists() and not out.with_suffix(".json").exists()
    here(checkpoint, out, seed=1)
    assert record_of(out)["settings"]["seed"] == 1


def test_damaged_and_foreign_blocks_are_made_again(small_blocks, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "a.npz"
    expected = here(checkpoint, tmp_path / "b.npz")
    blocks = interrupted(checkpoint, out, monkeypatch).blocks
    file = [blocks.file("images", block) for block in range(6)]
    content = file[0].read_bytes()
    file[0].write_bytes(content[:-1])
    file[1].write_bytes(b"")
    file[2].write_bytes(content + b"x")
    np.save(file[3], np.zeros((16, 16, 16, 3), np.float32))
    np.save(file[4], np.zeros((16, 8, 8, 3), np.uint8))
    file[5].with_suffix(".tmp").write_bytes(b"half a block")
    assert np.array_equal(here(checkpoint, out), expected)
    assert record_of(out)["images_sampled"] == 5 * 16


# ---------------------------------------------------------------- mistakes

WRONG = {
    "num_samples=0": "argument --num-samples: '0': expected a whole number",
    "steps=0": "argument --steps: '0': expected a whole number",
    "steps=x": "argument --steps: 'x': expected a whole number",
    "solver=euler": "argument --solver: invalid choice: 'euler'",
    "cfg_scale=nan": "argument --cfg-scale: 'nan': expected a finite number",
    "cfg_scale=1e38": "argument --cfg-scale: '1e38': expected a finite number",
    "timestep_shift=1e-320": "argument --timestep-shift: '1e-320': expected a finite number",
    "num_samples=1e12": "--num-samples 1000000000000 take 2 x",
    "guidance_low=0.8 guidance_high=0.3": "must not be above --guidance-high 0.3",
    "solver=sde steps=1": "--solver sde needs 2 steps or more",
    "num_samples=97 class_balanced=": "does not split evenly over 8 classes",
    "out=a.png": "--out a.png must end in .npz",
    "cfg_channels=5": "--cfg-channels 5: the latents of this SiT have 4 channels; 0 = all",
    "heun_guidance=predictor solver=sde": "needs --solver ode-heun: sde has no corrector",
    "classes=dog": "no class 'dog': the names of the classes are not recorded",
    "classes=8": "no class 8: the labels are 0 to 7",
    "classes=1,,2": "--classes '1,,2': expected labels or names",
    "classes=1,1": "class 1 is named twice",
    "classes=1 class_balanced=": "leave out --class-balanced",
    "per_class=4": "--per-class 4 needs --classes",
    "classes=1,2 per_class=4": "--num-samples 96 is not --per-class 4 times 2 of --classes",
    "classes=1,2,3,4,5": "--num-samples 96 does not split evenly over the 5 of --classes",
    "checkpoint=nowhere": "checkpoint nowhere: no such folder",
    "stepz=3": "unrecognized arguments: --stepz 3",
}


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize("flags", WRONG)
def test_a_mistake_ends_in_one_line_and_exit_code_2(
    flags, dry_run, checkpoint, tmp_path, capsys, monkeypatch
):
    pairs = [flag.split("=") for flag in flags.split()]
    given = {"checkpoint": checkpoint, "out": tmp_path / "a.npz"} | {k: v or True for k, v in pairs}
    words = [*arguments(**given), *dry_run]
    monkeypatch.setattr(sys, "argv", ["sample_ddp.py", *words])
    with pytest.raises(SystemExit) as end:
        cli.run(sample_ddp.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith("error: ") and WRONG[flags] in line
    assert not list(tmp_path.iterdir())


def test_guidance_needs_a_null_label(tmp_path):
    folder = make_checkpoint(tmp_path / "c", class_dropout_prob=0.0)
    with pytest.raises(UserError, match="trained without a null label"):
        here(folder, tmp_path / "a.npz", cfg_scale=2)


@pytest.mark.parametrize("dry_run", [{}, {"dry_run": True}])
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, dry_run):
    with pytest.raises(UserError, match="latents of 5 channels, vae/ decodes 4"):
        here(make_checkpoint(tmp_path / "a", in_channels=5), tmp_path / "a.npz", **dry_run)
    broken = make_checkpoint(tmp_path / "b")
    file = broken / "sit_ema" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["blocks.1.mlp.fc1.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"sit_ema .* missing \(blocks.1.mlp.fc1.bias\)"):
        here(broken, tmp_path / "b.npz", **dry_run)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="sit_ema"):
        here(broken, tmp_path / "c.npz", **dry_run)
    file.unlink()
    with pytest.raises(UserError, match=r"sit_ema.*no such file"):
        here(broken, tmp_path / "d.npz", **dry_run)
    config = broken / "sit_ema" / "config.json"
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(UserError, match=r"sit_ema/config\.json is a FIFO"):
        here(broken, tmp_path / "e.npz", **dry_run)


def test_state_json_gives_the_path_and_vouches_for_the_weights(tmp_path):
    folder = make_checkpoint(tmp_path / "c")
    state = folder / "state.json"
    state.write_text(json.dumps({"path": "cosine", "files": {}}))
    here(folder, tmp_path / "a.npz", num_samples=2)
    assert record_of(tmp_path / "a.npz")["settings"]["path"] == "cosine"
    here(folder, tmp_path / "b.npz", num_samples=2, path="linear")
    assert record_of(tmp_path / "b.npz")["settings"]["path"] == "linear"
    state.write_text(json.dumps({"files": {"vae/config.json": "0" * 64}}))
    with pytest.raises(UserError, match=r"vae/config.json is not as it was saved"):
        here(folder, tmp_path / "c.npz")
