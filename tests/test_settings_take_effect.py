"""No setting is accepted and ignored: each has its effect or is refused, in a new run, in one that
goes on, in one that goes on from another run's checkpoint, and with `run.init_from`.

python -m pytest tests/test_settings_take_effect.py
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_repae
from models.checks.errors import UserError
from tests.tiny import ROOT, TINY, batch, run_here, tiny_config, train_here, wake
from utils import distributed
from utils.config.load import SETTINGS, load_config, read_saved_config
from utils.config.resuming import FREE, STARTING, STEERING, is_in
from utils.config.schema import Config
from utils.data.training import open_training_data
from utils.pictures import preview
from utils.sampling.images import DrawnImages
from utils.sampling.settings import SamplingSettings
from utils.training import networks
from utils.training.networks import build_networks
from utils.training.online_evaluation import OnlineEvaluation
from utils.training.plan import changes_since, check_networks, starting_point

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("native_halves")]
# Everything takes part in a step of this run, so that every setting of it can be seen.
BASE = ("loss.reg.lecam=0.1", "loss.reg.lpips=1", "run.steps=10", "run.save_every=2")
BASE += ("loss.reg.perceptual=1", "loss.reg.perceptual_net=timm:test_resnet@random")

# setting: a value that two training steps must tell from that of BASE
IN_A_STEP = {
    "run.seed": "1",
    "run.batch_size": "4",
    "run.precision": "bf16",
    "data.resolution": "32",
    "data.hflip": "true",
    "data.num_classes": "11",
    "vae.name": "tiny-f8d4",
    "vae.train": "false",
    "sit.depth": "2",
    "sit.hidden_size": "64",
    "sit.num_heads": "1",
    "sit.patch_size": "4",
    "sit.qk_norm": "true",
    "sit.class_dropout_prob": "0.9",
    "sit.projector": "conv",
    "sit.projector_dim": "24",
    "disc.layers": "1",
    "disc.channels": "16",
    "disc.norm": "group",
    "disc.pretrain_steps": "8",
    "latent_norm.enabled": "false",
    "latent_norm.stats_images": "8",
    "encoder.names": "[timm:test_vit]",
    "encoder.weights": "[/no/such/file]",
    "encoder.grid": "2",
    "loss.diffusion.path": "cosine",
    "loss.diffusion.time": "lognormal",
    "loss.diffusion.vae": "1",
    "loss.align.sit": "2",
    "loss.align.vae": "2",
    "loss.align.depth": "3",
    "loss.align.spatial_norm": "0.6",
    "loss.reg.pixel": "2",
    "loss.reg.pixel_kind": "mse",
    "loss.reg.lpips": "2",
    "loss.reg.lpips_weights": "other.pth",
    "loss.reg.lpips_double_scaling": "true",
    "loss.reg.perceptual": "2",
    "loss.reg.perceptual_net": "timm:test_byobnet@random",
    "loss.reg.kl": "1",
    "loss.reg.gan": "1",
    "loss.reg.gan_start": "8",
    "loss.reg.lecam": "1",
    "ema.decay": "0.5",
    "ema.warmup": "true",
} | {
    f"{net}.optim.{name}": value
    for net in ("vae", "sit", "disc")
    for name, value in {
        "lr": "0.1", "beta1": "0.1", "beta2": "0.1", "eps": "1", "weight_decay": "5",
        "clip": "0.001", "warmup_steps": "100",
    }.items()
}  # fmt: skip


def evaluation_settings(c: Config) -> tuple[SamplingSettings, object]:
    made = OnlineEvaluation(c, open_training_data(c))
    return made.settings, made.options


def allowed_tf32(c: Config) -> bool:
    distributed.start(c.run_dir, [], c.run.tf32)
    return torch.backends.cuda.matmul.fp32_precision


def minutes_of_ranks(c: Config) -> float:
    """The time limit with which train_repae.py joins the other ranks."""

    def start(run_dir: Path, trackers: list[str], tf32: bool, minutes: float, _: int) -> None:
        raise UserError(str(minutes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_repae, "load_config", lambda *_: c)
        patch.setattr(distributed, "start", start)
        patch.setattr("sys.argv", ["train_repae.py"])
        with pytest.raises(UserError) as caught:
            train_repae.main()
    return float(str(caught.value))


def preview_settings(c: Config) -> tuple[int, dict]:
    """Number of images, and what the sampler is told."""
    told = []

    def begin(settings: SamplingSettings, sit, vae, indices: range, *_) -> DrawnImages:
        names = ("solver", "steps", "cfg_scale")
        told.append((len(indices), {name: getattr(settings, name) for name in names}))
        return DrawnImages(sit.device, [torch.zeros(1)])

    source, accelerator = open_training_data(c), distributed.start(c.run_dir, [], tf32=False)
    nets, _ = build_networks(c, source, accelerator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "begin_images", begin)
        preview.Previewer(c, source, accelerator).sample(nets)
    return sum(num for num, _ in told), told[0][1]


def conversion_of_data(config):
    return open_training_data(config).conversion


# setting: (value, what it decides)
SEEN = {
    "run.name": ("b", attrgetter("run_dir")),
    "run.out": ("b", attrgetter("run_dir")),
    "run.tf32": ("false", allowed_tf32),
    "run.rank_timeout": ("3", minutes_of_ranks),
    "data.split": ("train", lambda c: len(open_training_data(c))),
    "data.exif": ("true", conversion_of_data),
    "data.depth_range": ("[0,4095]", conversion_of_data),
    "sit.size": ("SiT-S/2", lambda c: replace(c, sit=replace(c.sit, patch_size=None)).sit_shape()),
    "preview.num": ("3", preview_settings),
    "preview.solver": ("sde", preview_settings),
    "preview.steps": ("3", preview_settings),
    "preview.cfg_scale": ("3", preview_settings),
    "eval.features": ("pixel", evaluation_settings),
    "eval.weights": ("file.pth", evaluation_settings),
    "eval.metrics": ("[kid]", evaluation_settings),
    "eval.batch_size": ("7", evaluation_settings),
    "eval.solver": ("sde", evaluation_settings),
    "eval.steps": ("7", evaluation_settings),
    "eval.cfg_scale": ("3", evaluation_settings),
}

# setting: another value; the effect in a new run is seen in the tests that name the setting
ELSEWHERE = {
    "run.steps": "12",
    "run.accumulation": "2",
    "run.compile": "true",
    "run.compile_mode": "reduce-overhead",
    "run.checkpointing": "both",
    "run.channels_last": "true",
    "run.shard_optimizer": "true",
    "run.bucket_mb": "100",
    "run.lpips_precision": "fp16",
    "run.resume": "never",
    "run.init_from": "/no/such/folder",
    "run.init_new": "[classes]",
    "run.allow_change": "[run.seed]",
    "run.on_nonfinite": "skip",
    "run.max_nonfinite": "3",
    "run.skip_steps": "[7]",
    "run.disk_wait": "3",
    "run.log_every": "1",
    "run.save_every": "3",
    "run.keep_last": "1",
    "run.milestone_every": "3",
    "run.trackers": "[tensorboard]",
    "data.source": "synthetic",
    "data.path": "/no/such/folder",
    "data.labels": "folder",
    "data.latents": "/no/such/folder",
    "data.max_bad_images": "3",
    "data.workers": "1",
    "vae.weights": "/no/such/folder",
    "disc.weights": "/no/such/file",
    "encoder.cached": "true",
    "eval.every": "3",
    "eval.num": "7",
    "eval.reference": "/no/such/file",
    "preview.every": "3",
}
VALUES = IN_A_STEP | {name: value for name, (value, _) in SEEN.items()} | ELSEWHERE


class ToyLpips(torch.nn.Module):
    """Like LPIPS, tells a shift of both images from none; another file makes another network."""

    def __init__(self, weights: str | None):
        super().__init__()
        self.scale = 2.0 if weights else 1.0

    def forward(self, x: torch.Tensor, y: torch.Tensor, normalize: bool) -> torch.Tensor:
        x, y = (2 * x - 1, 2 * y - 1) if normalize else (x, y)
        return self.scale * (x**2 - y**2).square().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture(scope="module", autouse=True)
def toy_lpips():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "load_lpips", ToyLpips)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, toy_lpips) -> Path:
    """After two steps of BASE."""
    out = tmp_path_factory.mktemp("out")
    assert train_here(out, *BASE, "run.steps=2") == 0
    return out / "tiny" / "checkpoints" / "0000002"


def two_steps(c: Config, origin: Path | None = None) -> list[torch.Tensor]:
    """All metrics and weights of two steps of a run that begins with the checkpoint `origin`."""
    source = open_training_data(c)
    accelerator = distributed.start(c.run_dir, [], tf32=False)
    nets, _ = build_networks(c, source, accelerator, origin)
    if origin is None and c.run.init_from is None:
        wake(nets)
    seen = []
    for step in (4, 5):
        x, y, draws = batch(c, step)
        seen += train_repae.train_step(nets, x, y, draws, c, step).values()
    return [*seen, *nets.vae.state_dict().values(), *nets.ema.state_dict().values()]


def is_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def differ_or_refused(usual: list[torch.Tensor], run: Callable[[], list[torch.Tensor]]) -> bool:
    """Whether `run` gives other numbers than `usual`, or is refused in one line."""
    try:
        return not is_equal(usual, run())
    except UserError as error:
        return "\n" not in str(error)


@pytest.fixture(scope="module")
def plain(toy_lpips) -> list[torch.Tensor]:
    return two_steps(tiny_config(*BASE))


@pytest.fixture(scope="module")
def plain_resumed(checkpoint) -> list[torch.Tensor]:
    return two_steps(tiny_config(*BASE), checkpoint)


@pytest.fixture(scope="module")
def plain_from(checkpoint) -> list[torch.Tensor]:
    return two_steps(tiny_config(*BASE, f"run.init_from={checkpoint}"))


def test_every_setting_has_a_row_and_the_same_run_is_the_same(plain):
    assert sorted(VALUES) == sorted(SETTINGS)
    assert len(VALUES) == len(IN_A_STEP) + len(SEEN) + len(ELSEWHERE)
    assert is_equal(plain, two_steps(tiny_config(*BASE)))


@pytest.mark.parametrize("name", IN_A_STEP)
def test_in_a_new_run_a_setting_changes_the_steps_or_is_refused(name, plain):
    words = f"{name}={IN_A_STEP[name]}"
    assert differ_or_refused(plain, lambda: two_steps(tiny_config(*BASE, words)))


@pytest.mark.parametrize("name", SEEN)
def test_in_a_new_run_a_setting_decides_what_is_used(name):
    value, what = SEEN[name]
    assert what(tiny_config(*BASE)) != what(tiny_config(*BASE, f"{name}={value}"))


def test_what_is_not_seen_here_is_named_by_another_test():
    tests = [p for p in (ROOT / "tests").rglob("test_*.py") if p != Path(__file__).resolve()]
    text = "\n".join(path.read_text() for path in tests if path.parent.name != "config")
    assert not [name for name in ELSEWHERE if not re.search(rf"\b{re.escape(name)}\b", text)]


def goes_on(checkpoint: Path, *words: str) -> list[str]:
    """The changes of a run that goes on with these settings; and whether the start is found."""
    c = tiny_config(*BASE, *words)
    start = starting_point(c, read_all=False)
    assert start.checkpoint == checkpoint
    return changes_since(c, start, open_training_data(tiny_config(*BASE)))


@pytest.mark.parametrize("name", [name for name in VALUES if name != "run.resume"])
@pytest.mark.parametrize("path", [False, True], ids=["resume", "resume=PATH"])
def test_a_run_that_goes_on_lists_a_change_or_refuses_it_by_name(name, path, checkpoint, tmp_path):
    out = tmp_path if path else checkpoint.parents[2]
    words = [f"run.out={out}", *([f"run.resume={checkpoint}"] if path else [])]
    if name in ("run.out", "run.name"):  # another folder, where nothing is found
        words += [f"run.resume={checkpoint}"]
    words = [*words, f"{name}={VALUES[name]}"]
    more = {"data.latents": ["vae.train=false"], "encoder.cached": ["vae.train=false"]}
    words += more.get(name, [])
    if is_in(name, (*FREE, *STEERING)):
        assert any(f"{name}=" in line for line in goes_on(checkpoint, *words))
    else:
        with pytest.raises(UserError, match=name.split(".")[-1]):
            goes_on(checkpoint, *words)


@pytest.mark.parametrize("name", [n for n in VALUES if not is_in(n, (*FREE, *STEERING))])
def test_a_change_can_be_allowed_but_not_of_what_a_run_started_with(name, checkpoint):
    words = [f"run.out={checkpoint.parents[2]}", f"{name}={VALUES[name]}"]
    try:
        tiny_config(*BASE, *words)
    except UserError:
        return  # refused in any run
    allow = f"run.allow_change=[{name}]"
    if is_in(name, STARTING):
        with pytest.raises(UserError, match=re.escape(name)):
            goes_on(checkpoint, *words, allow)
    else:
        assert any(f"{name}=" in line for line in goes_on(checkpoint, *words, allow))


@pytest.mark.parametrize("name", [n for n in IN_A_STEP if is_in(n, STEERING)])
def test_an_optimizer_that_goes_on_takes_its_new_settings(name, checkpoint, plain_resumed):
    """Also those that AdamW keeps in its own state."""
    c = tiny_config(*BASE, f"{name}={IN_A_STEP[name]}")
    assert not is_equal(plain_resumed, two_steps(c, checkpoint))


@pytest.mark.parametrize("name", [n for n in IN_A_STEP if n != "latent_norm.stats_images"])
def test_with_init_from_a_setting_changes_the_steps_or_is_refused(name, checkpoint, plain_from):

    def run() -> list[torch.Tensor]:
        c = tiny_config(*BASE, f"run.init_from={checkpoint}", f"{name}={IN_A_STEP[name]}")
        check_networks(c, open_training_data(c), starting_point(c))
        return two_steps(c)

    assert differ_or_refused(plain_from, run)


def test_with_init_from_the_vae_is_that_of_the_checkpoint_and_the_config_says_so(checkpoint):
    words = [f"run.init_from={checkpoint}", "run.trackers=[]"]
    config = load_config([], words)  # TINY names a VAE
    assert (config.vae.name, config.vae.weights) == (str(checkpoint / "vae"), None)
    for given in ("vae.weights=hub", "vae.weights=/no/such/folder"):
        with pytest.raises(UserError, match=r"vae\.weights=null"):
            load_config([], [*words, given])
    config = tiny_config(*BASE, words[0])
    assert (config.vae.name, config.vae.weights) == ("tiny-f2d4", None)


def test_with_init_from_a_discriminator_of_the_settings_comes_first(checkpoint, tmp_path):
    file = checkpoint / "discriminator.safetensors"
    other = {name: value + 1 for name, value in load_file(file).items()}
    save_file(other, tmp_path / "disc.safetensors")
    source = open_training_data(tiny_config())
    for words, expected in (
        ([], load_file(file)),
        ([f"disc.weights={tmp_path}/disc.safetensors"], other),
    ):
        c = tiny_config(f"run.init_from={checkpoint}", *BASE, *words)
        nets, _ = build_networks(c, source, distributed.start(c.run_dir, [], tf32=False))
        assert all(torch.equal(v, expected[k]) for k, v in nets.disc.state_dict().items())
    c = tiny_config(*BASE, "disc.weights=/no/such/file")  # a run that goes on does not read it
    build_networks(c, source, distributed.start(c.run_dir, [], tf32=False), checkpoint)


def test_training_lists_what_has_changed_and_writes_nothing_if_it_is_refused(tmp_path, capsys):
    assert train_here(tmp_path, *BASE, "run.steps=2") == 0
    config = tmp_path / "tiny" / "config.yaml"
    before, files = config.read_bytes(), sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert train_here(tmp_path, *BASE, "run.steps=4", "run.seed=5", "sit.optim.beta1=0.5") == 2
    assert "run.seed=0 (now 5)" in capsys.readouterr().err
    assert config.read_bytes() == before and sorted(tmp_path.rglob("*")) == files
    allowed = ("run.allow_change=[run.seed]", "run.seed=5", "sit.optim.beta1=0.5")
    assert train_here(tmp_path, *BASE, "run.steps=4", *allowed) == 0
    printed = capsys.readouterr().out
    assert all(x in printed for x in ("run.seed=0 (now 5)", "sit.optim.beta1=0.9 (now 0.5)"))
    saved = read_saved_config(config)
    assert (saved.run.seed, saved.sit.optim.beta1) == (5, 0.5)
    # what a checkpoint has recorded need not be allowed again
    assert train_here(tmp_path, *BASE, "run.steps=6", "run.seed=5", "sit.optim.beta1=0.5") == 0


def test_a_run_that_began_with_another_checkpoint_goes_on_without_it(checkpoint, tmp_path):
    origin = shutil.copytree(checkpoint, tmp_path / "origin")
    words = [word for word in TINY if not word.startswith("vae.name")]
    words += [*BASE, f"run.out={tmp_path}", f"run.init_from={origin}"]
    assert run_here("train_repae.py", *words, "run.steps=2") == 0
    assert read_saved_config(tmp_path / "tiny" / "config.yaml").vae.name == str(origin / "vae")
    shutil.rmtree(origin)
    assert run_here("train_repae.py", *words, "run.steps=4") == 0
    assert run_here("train_repae.py", *words, "run.steps=4", "run.name=other") == 2
