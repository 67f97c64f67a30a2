"""The doctor: every check speaks, faults come with what to change, what it advises works.

python -m pytest tests/scripts/test_doctor.py        (CPU; the only network is a server in here)
"""

import re
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from models.vae import build_vae
from models.wanted import Wanted
from scripts import cache_latents, doctor, prepare_data
from tests.tiny import TINY, run_script, tiny_config, train_here
from utils import checks, cli, environment
from utils.checkpoint import Checkpoints
from utils.checks import kept_checkpoints
from utils.memory import GIB, RESERVE, estimate, skeleton

CHECKS = ["packages", "data", "images", "batch", "tokens", "device", "workers", "resume"]
CHECKS += ["vae", "encoder", "disc", "disk", "memory"]
PASSED = {"packages", "device", "workers"}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def examined(capsys, tmp_path, monkeypatch):
    """Call the doctor on the tiny config => (exit code, {name of a check: [(status, text)]})."""

    def examine(*words) -> tuple[int, dict[str, list[tuple[str, str]]]]:
        out = f"run.out={tmp_path / 'out'}"
        monkeypatch.setattr(sys, "argv", ["doctor.py", *TINY, out, *map(str, words)])
        capsys.readouterr()
        code = doctor.main()
        found: dict = {}
        *lines, _ = capsys.readouterr().out.splitlines()
        for line in lines:
            status, name, text = re.fullmatch(r"(ok|warn|FAIL) +(\w+) +(.+)", line).groups()
            found.setdefault(name, []).append((status, text))
        return code, found

    return examine


@pytest.fixture
def quick(examined, monkeypatch):
    """The same without the memory check, which takes most of the time."""
    monkeypatch.delitem(doctor.CHECKS, "memory")
    return examined


def only(found: dict, name: str) -> tuple[str, str]:
    (finding,) = found[name]
    return finding


def images(root: Path, per_class: dict[str, int], side: int = 20) -> Path:
    """Noise in root/CLASS; class "." is root itself."""
    rng = np.random.default_rng(0)
    for name, num in per_class.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(num):
            pixels = rng.integers(0, 256, (side, side + 3, 3), "u1")
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_a_sound_run_has_a_line_a_check_and_nothing_is_written(examined, tmp_path):
    code, found = examined()
    assert code == 0 and list(found) == CHECKS
    assert {status for lines in found.values() for status, _ in lines} == {"ok"}
    assert only(found, "data")[1].startswith("1,797 images of 10 classes")
    assert only(found, "batch")[1].startswith("8 = 8 x 1 rank(s) x 1 micro-batch(es)")
    assert only(found, "tokens")[1].startswith("4x4 of 4x8x8 latents")
    assert not (tmp_path / "out").exists() and not (tmp_path / "torch").exists()


def test_every_fault_is_named_and_none_stops_the_others(examined):
    code, found = examined(
        *("data.source=folder", "data.path=/nowhere", "run.batch_size=9", "--processes", 2),
        *("encoder.grid=2", "encoder.weights=[x.pth]", "vae.weights=y", "disc.weights=z.pt"),
        *("loss.reg.lpips=1", "loss.reg.lpips_weights=v", "eval.every=2", "run.resume=/none"),
    )
    failed = {name: text for name, ((status, text),) in found.items() if status == "FAIL"}
    assert code == 2
    assert failed.keys() == {*CHECKS, "lpips", "eval"} - {*PASSED, "images", "disk", "memory"}
    assert "no such folder" in failed["data"] and "a multiple of 2" in failed["batch"]
    assert "set encoder.grid=4" in failed["tokens"] and "vae.weights=y" in failed["vae"]
    assert "loss.reg.lpips=0" in failed["lpips"] and "disc.weights=z.pt" in failed["disc"]
    assert "eval.every=0" in failed["eval"] and "run.resume=/none" in failed["resume"]


def test_a_config_that_cannot_load_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor.py", "run.stepz=1"])
    with pytest.raises(SystemExit) as end:
        cli.run(doctor.main)
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert re.fullmatch(r"error: config: .*Did you mean: 'steps'.*\n", printed.err)


@pytest.mark.slow
def test_the_quickstarts_config_from_the_command_line(tmp_path):
    words = ("encoder.weights=[random]", f"run.out={tmp_path}")
    done = run_script("scripts/doctor.py", "--config", "configs/quickstart.yaml", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout and done.stderr == ""


# ---- data ----------------------------------------------------------------------------------------


def test_a_flat_folder_is_one_class(quick, tmp_path):
    root = images(tmp_path / "flat", {".": 9})
    code, found = quick("data.source=folder", f"data.path={root}")
    assert code == 0 and "9 images of one class" in only(found, "data")[1]
    assert "guidance" in only(found, "data")[1] and "20 px or more" in only(found, "images")[1]


def test_too_few_too_small_and_broken_images(quick, tmp_path):
    root = images(tmp_path / "own", {"a": 3, "b": 2, "c": 1}, side=12)
    where = ("data.source=folder", f"data.path={root}")
    code, found = quick(*where)
    (_, (status, text)) = found["data"]
    assert code == 2 and status == "FAIL" and "fewer than run.batch_size=8" in text
    status, text = only(found, "images")
    assert status == "warn" and "6 of 6 sampled are smaller than 16 px (down to 12)" in text
    (root / "b" / "1.png").write_bytes(b"no image")
    code, found = quick(*where, "run.batch_size=2", "data.num_classes=3")
    status, text = only(found, "images")
    assert code == 2 and status == "FAIL" and "1 of 6 sampled" in text and "b/1.png" in text


def test_classes_and_packed_resolution_that_are_not_the_expected_ones(quick, tmp_path):
    root = images(tmp_path / "own", {"a": 5, "b": 5})
    _, found = quick("data.source=folder", f"data.path={root}", "data.num_classes=1000")
    assert "the data has 2: correct it, or set data.num_classes=null" in only(found, "data")[1]
    words = [root, tmp_path / "packed", "--resolution", 8, "--workers", 0]
    assert prepare_data.main([*map(str, words)]) == 0
    _, found = quick("data.source=packed", f"data.path={tmp_path / 'packed'}")
    status, text = only(found, "data")
    assert status == "FAIL" and "packed with resolution 8, but 16 is asked for" in text
    _, found = quick("data.source=packed", "data.path=/no/packed")
    assert "scripts/prepare_data.py IMAGES /no/packed --resolution 16" in only(found, "data")[1]


# ---- weights -------------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """Has a file, a gated one, and nothing else; GET would be a download."""

    def __init__(self, asked: list, *args):
        self.asked = asked
        super().__init__(*args)

    def do_HEAD(self):
        self.asked.append(self.path)
        gated = "gated" in self.path
        self.send_response(403 if gated else 404 if "absent" in self.path else 200)
        if gated:
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """(its address, the paths it was asked for); the hub is there, too."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, asked))
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    environment._why_no_answer.cache_clear()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    environment._why_no_answer.cache_clear()


def test_a_file_that_can_be_downloaded_is_fine_and_is_not_fetched(server):
    address, asked = server
    found = checks.place_of(Wanted("vgg.pth", None, f"{address}/vgg.pth", "fetch it"), "lpips")
    assert found == ("ok", "vgg.pth will be downloaded at the start", "lpips")
    assert asked == ["/vgg.pth"]  # by HEAD: the server knows nothing else
    found = checks.place_of(Wanted("b", None, f"{address}/absent.pth", "fetch it"), "lpips")
    assert found.status == "FAIL" and "answers 404: fetch it" in found.text


def test_a_host_that_does_not_answer_fails_with_the_remedy(server):
    address, _ = server
    dead = re.sub(r":\d+$", ":9", address)  # nothing listens there
    found = checks.place_of(Wanted("a", None, f"{dead}/a", "copy it to DIR"), "vae")
    assert found.status == "FAIL" and found.text.endswith(
        "127.0.0.1:9 cannot be reached: copy it to DIR"
    )


def test_the_hubs_answer_for_a_file(server, monkeypatch):
    address, asked = server
    monkeypatch.setattr(constants, "ENDPOINT", address)
    assert (
        environment.why_unreachable(f"{address}/me/vae/resolve/main/a") == "HF_HUB_OFFLINE is set"
    )
    assert asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert environment.why_unreachable(f"{address}/me/vae/resolve/main/a") is None
    assert "licence" in environment.why_unreachable(f"{address}/me/gated/resolve/main/a")
    assert "404" in environment.why_unreachable(f"{address}/me/absent/resolve/main/a")


def test_published_weights_that_are_not_here_and_those_in_the_caches(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    words = ("vae.name=sdvae", "vae.weights=hub", "encoder.weights=[null]", "loss.reg.lpips=1")
    words += ("encoder.names=[dinov2-s]", "sit.patch_size=1", "encoder.grid=2")
    environment._why_no_answer.cache_clear()
    monkeypatch.setattr(environment, "_ask", lambda url: "no network in a test")
    _, found = quick(*words)
    assert only(found, "vae")[0] == only(found, "encoder")[0] == only(found, "lpips")[0] == "FAIL"
    assert "hf download stabilityai/sd-vae-ft-mse --local-dir DIR" in only(found, "vae")[1]
    assert "encoder.weights=FILE" in only(found, "encoder")[1]
    assert not (tmp_path / "hub").exists()
    for repo, files in (
        ("stabilityai/sd-vae-ft-mse", ("config.json", "diffusion_pytorch_model.safetensors")),
        ("timm/vit_small_patch14_dinov2.lvd142m", ("model.safetensors",)),
    ):
        put_into_hub_cache(tmp_path / "hub", repo, files)
    vgg = tmp_path / "torch" / "hub" / "checkpoints" / "vgg16-397923af.pth"
    vgg.parent.mkdir(parents=True)
    vgg.touch()
    code, found = quick(*words)
    assert code == 0 and only(found, "lpips") == ("ok", str(vgg))
    assert only(found, "vae")[1].endswith("/main/diffusion_pytorch_model.safetensors")
    environment._why_no_answer.cache_clear()


def put_into_hub_cache(cache: Path, repo: str, files: tuple[str, ...]) -> None:
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("main")
    (root / "snapshots" / "main").mkdir(parents=True)
    for file in files:
        (root / "snapshots" / "main" / file).touch()


# ---- the run's folder ----------------------------------------------------------------------------


def test_resume_says_where_a_run_goes_on_and_what_has_changed(quick, tmp_path):
    out = tmp_path / "out"
    assert train_here(out, "run.steps=2") == 0
    code, found = quick()
    assert code == 0 and "step 2 of 4" in only(found, "resume")[1]
    assert only(found, "vae")[1].startswith(str(out / "tiny" / "checkpoints" / "0000002"))
    _, found = quick("run.steps=2")
    assert only(found, "resume")[0] == "warn" and "raise run.steps" in only(found, "resume")[1]
    code, found = quick("sit.optim.lr=0.5")
    (_, (status, text)) = found["resume"]
    assert code == 0 and status == "warn" and "sit.optim.lr=0.001 (now 0.5)" in text
    code, found = quick("sit.hidden_size=64")
    assert code == 2 and "do not fit this config" in only(found, "resume")[1]
    code, found = quick("run.resume=never")
    assert code == 2 and "choose another run.name" in only(found, "resume")[1]
    code, found = quick("run.name=new", f"run.init_from={out}/tiny/checkpoints/0000002")
    assert code == 0 and "a new run in" in only(found, "resume")[1]


@pytest.mark.parametrize("changes", [(2, 3, 0, 11), (2, 3, 6, 13), (3, 10, 5, 20), (1, 50, 0, 20)])
def test_the_number_of_checkpoints_is_what_a_run_keeps(changes, tmp_path):
    names = ("keep_last", "save_every", "milestone_every", "steps")
    c = tiny_config(*(f"run.{name}={value}" for name, value in zip(names, changes)))
    run, kept = c.run, Checkpoints(tmp_path, c.run.keep_last, c.run.milestone_every)
    for step in range(1, run.steps + 1):
        if step % run.save_every == 0 or step == run.steps:
            kept.save(step, lambda folder: None, {})
    assert kept_checkpoints(c) == len(list(kept.folder.iterdir()))


def test_a_full_disk_fails_and_the_advice_lowers_the_need(quick, monkeypatch):
    words = ("run.steps=8", "run.milestone_every=0")
    _, found = quick(*words, "run.keep_last=3")
    each = float(re.search(r"3 \+ 1 checkpoints of (\d+) MiB", only(found, "disk")[1]).group(1))
    room = int(3.5 * each * 2**20)
    monkeypatch.setattr(checks, "free_disk", lambda path: (Path("/"), room))
    code, found = quick(*words, "run.keep_last=3")
    assert code == 2 and "lower run.keep_last=3" in only(found, "disk")[1]
    code, found = quick(*words, "run.keep_last=2")
    assert code == 0 and only(found, "disk")[0] == "ok"


# ---- machine -------------------------------------------------------------------------------------


def test_too_little_gpu_memory_and_the_advice_that_helps(examined):
    c = tiny_config()
    found = estimate(c, skeleton(c, 10), doctor.train_step)
    short = (found.peak(64, 3) + found.peak(64, 4)) / 2 + RESERVE  # no 3 divides 64
    memory = ("--gpu-memory", short / GIB, "run.batch_size=64")
    code, found = examined(*memory)
    status, text = only(found, "memory")
    assert code == 2 and status == "FAIL"
    advice = re.search(r"set (run\.accumulation=\d+)", text).group(1)
    assert advice == "run.accumulation=4"
    assert examined(*memory, advice)[0] == 0
    _, found = examined("--gpu-memory", 1, "run.batch_size=64")
    assert "take a smaller sit.size" in only(found, "memory")[1]


def test_checkpointing_is_advised_where_micro_batches_do_not_suffice(examined):
    wide = ("vae.train=false", "vae.weights=hub", "sit.hidden_size=256", "sit.depth=4")
    wide += ("run.batch_size=1", "loss.align.sit=0", "loss.align.vae=0")
    c = tiny_config(*wide)
    plain = estimate(c, skeleton(c, 10), doctor.train_step).peak(1)
    words = (*wide, "--gpu-memory", (plain - 1 + RESERVE) / GIB)
    code, found = examined(*words)
    advice = re.search(r"set (run\.\w+=true) (run\.\w+=1) ", only(found, "memory")[1]).groups()
    assert code == 2 and advice[0] == "run.gradient_checkpointing=true"
    assert examined(*words, *advice)[0] == 0


def test_workers_need_cores_and_shared_memory(quick, monkeypatch):
    monkeypatch.setattr(environment, "cpu_cores", lambda: 4)
    code, found = quick("data.workers=3", "--processes", 2)
    status, text = only(found, "workers")
    assert code == 0 and status == "warn" and "set data.workers=2" in text
    batch = 4 * 4 * 3 * 16 * 16  # batches ahead x images of a rank x their bytes
    monkeypatch.setattr(environment, "free_shared_memory", lambda: 2 * 2 * batch)
    code, found = quick("data.workers=3", "--processes", 2)
    status, text = only(found, "workers")
    assert code == 2 and status == "FAIL" and "data.workers=2" in text and "--shm-size" in text
    assert quick("data.workers=2", "--processes", 2)[0] == 0


def test_packages_are_compared_with_the_requirements(quick, monkeypatch, tmp_path):
    assert environment.outdated_packages() == []
    file = tmp_path / "requirements.txt"
    file.write_text("torch>=99.1  # too new\nnumpy>=1\nno-such-package>=2\n\n# a comment\n")
    monkeypatch.setattr(environment, "REQUIREMENTS", file)
    here = torch.__version__.split("+")[0]
    expected = [f"torch>=99.1 (here: {here})", "no-such-package>=2 (here: none)"]
    assert environment.outdated_packages() == expected
    _, found = quick()
    assert found["packages"][0][0] == "warn" and "pip install" in found["packages"][0][1]


def test_a_published_run_with_another_batch_is_told_so(quick):
    config = ("--config", "configs/imagenet256/base.yaml", *TINY, "data.num_classes=10")
    _, found = quick(*config, "run.batch_size=64")
    status, text = only(found, "batch")
    assert status == "warn" and "run.batch_size=256" in text


def test_a_random_discriminator_beside_a_pretrained_vae_is_spoken_of(quick, tmp_path):
    build_vae("tiny-f2d4").save(tmp_path / "vae")
    pretrained = f"vae.weights={tmp_path / 'vae'}"
    warned = [f for f in quick(pretrained)[1]["disc"] if f[0] == "warn"]
    assert len(warned) == 1 and "disc.alone_steps" in warned[0][1]
    for more in ((pretrained, "disc.alone_steps=2"), (pretrained, "loss.reg.gan_start=2"), ()):
        assert [status for status, _ in quick(*more)[1]["disc"]] == ["ok"]


def test_cached_latents_are_joined_and_no_encoder_is_wanted(examined, tmp_path, monkeypatch):
    """Those of other images fail; those of these make the encoder needless, and a step smaller."""
    build_vae("tiny-f2d4").save(tmp_path / "vae")
    data = ["--data", "digits", "--resolution", 16, "--split", "test", "--workers", 0]
    words = ["--vae", tmp_path / "vae", *data, "--out", tmp_path / "c", "--encoder-grid", 4]
    words += ["--encoders", "timm:test_resnet/16", "--encoder-weights", "random"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["cache_latents.py", *map(str, words)])
        cache_latents.main()
    frozen = [
        "vae.train=false",
        f"vae.weights={tmp_path / 'vae'}",
        f"data.latents={tmp_path / 'c'}",
    ]
    code, found = examined(*frozen)
    assert code == 2 and "images without latents: 1438" in only(found, "latents")[1]
    code, found = examined(*frozen, "data.split=test", "encoder.cached=true")
    assert code == 0 and only(found, "latents")[0] == "ok" and "encoder" not in found
    assert only(found, "memory")[0] == "ok"
