"""Cached latents: the same training without the VAE, and nothing joined that does not belong.

python -m pytest tests/scripts/test_cache_latents.py
"""

import json
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import train_repae
from models.checks.errors import UserError
from models.encoders import encoder_shape, load_encoder
from models.vae import build_vae, load_vae
from scripts import cache_latents, prepare_data
from tests.tiny import ROOT, draws_of, run_script, tiny_config, train_here
from utils import distributed
from utils.benchmark.clock import PhaseClock
from utils.benchmark.training import Training
from utils.data import latents
from utils.data.base import BadImages, Source, collate
from utils.data.images import u8_to_pm1
from utils.data.latent_writer import CacheWriter
from utils.data.latents import CachedSource, CacheMeta, LatentCache, checksum
from utils.data.registry import open_source
from utils.data.training import join_cache
from utils.training.batch import make_batch, to_device
from utils.training.draws import Draws
from utils.training.networks import build_networks
from utils.training.plan import check_run

SCRIPT = "scripts/cache_latents.py"
NUM = 40
ENCODER = ("--encoders", "timm:test_resnet/16", "--encoder-weights", "random", "--encoder-grid", 4)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """40 digits as files, in three classes."""
    root = tmp_path_factory.mktemp("images")
    digits = open_source("digits", None, 16)
    for i in range(NUM):
        folder = root / "abc"[i % 3]
        folder.mkdir(exist_ok=True)
        Image.fromarray(digits[i][0].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A VAE with a spread posterior, so that mean and std both matter."""
    torch.manual_seed(3)
    vae = build_vae("tiny-f2d4")
    with torch.no_grad():
        vae.net.quant_conv.bias[4:] -= 1.0
    folder = tmp_path_factory.mktemp("vae")
    vae.save(folder)
    return folder


def words(images, vae, out, *more) -> list[str]:
    given = ["--vae", vae, "--data", "folder", "--path", images, "--resolution", 16, "--out", out]
    return [str(w) for w in (*given, "--workers", 0, "--shard-size", 16, "--batch-size", 8, *more)]


def cache_here(monkeypatch, *args) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [SCRIPT, *words(*args)])
        cache_latents.main()


@pytest.fixture(scope="module")
def cache(images, vae, tmp_path_factory):
    """With mirrored copies and features."""
    out = tmp_path_factory.mktemp("cache") / "c"
    with pytest.MonkeyPatch.context() as patch:
        cache_here(patch, images, vae, out, "--hflip", *ENCODER)
    return out


@pytest.fixture(scope="module")
def plain(images, vae, tmp_path_factory):
    """Neither mirrored copies nor features."""
    out = tmp_path_factory.mktemp("plain") / "c"
    with pytest.MonkeyPatch.context() as patch:
        cache_here(patch, images, vae, out)
    return out


def config_of(images, vae, cache=None, *more):
    given = ["vae.train=false", f"vae.name={vae}", "vae.weights=hub", "data.source=folder"]
    given += [f"data.path={images}"] + [f"data.latents={cache}"] * (cache is not None)
    return tiny_config(*given, *more)


def examples_of(config, images) -> Source:
    return join_cache(config, open_source("folder", images, config.data.resolution))


def first_batch(examples: Source) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The first eight examples as a step gets them: images in [-1, 1], labels, cached rows."""
    return to_device(collate([examples[i] for i in range(8)]), torch.device("cpu"), False)


def latents_of(nets, rows, draws: Draws, hflip: bool) -> torch.Tensor:
    """What the SiT phase of a step with a frozen VAE is given."""
    x, y, cached = rows
    return train_repae.encode_frozen(nets, make_batch(x, y, draws, cached, hflip).split(1))


def one_step(config, images):
    """Losses and gradients of one step, and the latents it used."""
    accelerator = distributed.start(config.run_dir, [], tf32=False)
    examples = examples_of(config, images)
    cache = examples.cache if config.data.latents else None
    nets, _ = build_networks(config, examples, accelerator, cache=cache)
    rows, draws = first_batch(examples), draws_of(config, (8, 4, 8, 8))
    z = latents_of(nets, rows, draws, config.data.hflip)
    x, y, cached = rows
    return train_repae.train_step(nets, x, y, draws, config, 0, cached), z, nets


@pytest.mark.parametrize("hflip", ["false", "true"])
def test_a_step_from_the_cache_is_the_step_through_the_vae(images, vae, cache, hflip):
    """Posteriors re-sampled with the step's noise, mirrored where it says so; float16 apart."""
    flip = f"data.hflip={hflip}"
    metrics, z, _ = one_step(config_of(images, vae, None, flip, "sit.optim.clip=0"), images)
    ours, z_cached, _ = one_step(config_of(images, vae, cache, flip, "sit.optim.clip=0"), images)
    torch.testing.assert_close(z_cached, z, rtol=2e-3, atol=2e-3)
    for name in ("loss/sit/diffusion", "loss/sit/align", "grad_norm/sit"):
        torch.testing.assert_close(ours[name], metrics[name], rtol=1e-2, atol=1e-3)


def test_latents_are_drawn_anew_in_every_step(images, vae, cache):
    config = config_of(images, vae, cache)
    rows = first_batch(examples_of(config, images))
    z = [
        latents_of(None, rows, draws_of(config, (8, 4, 8, 8), step), hflip=False) for step in (0, 1)
    ]
    std = rows[2][0][:, 0, 1].float()
    assert ((z[0] - z[1]).abs() > 0.01 * std).float().mean() > 0.95


def test_neither_vae_nor_encoder_runs_nor_is_an_image_read(images, vae, cache, monkeypatch):
    config = config_of(images, vae, cache, "encoder.cached=true")
    examples = examples_of(config, images)

    def refuse(*_):
        raise AssertionError("it ran")

    monkeypatch.setattr("utils.training.networks.load_encoder", refuse)
    monkeypatch.setattr(type(examples.images), "__getitem__", refuse)
    accelerator = distributed.start(config.run_dir, [], tf32=False)
    nets, _ = build_networks(config, examples, accelerator, cache=examples.cache)
    monkeypatch.setattr(nets.vae, "encode", refuse)
    x, y, cached = first_batch(examples)
    metrics = train_repae.train_step(nets, x, y, draws_of(config, (8, 4, 8, 8)), config, 0, cached)
    assert metrics["loss/sit/align"].isfinite() and x.numel() == 0


@pytest.mark.parametrize("cached", ["false", "true"])
def test_a_benchmark_with_data_trains_on_the_cache(images, vae, cache, cached):
    config = config_of(images, vae, cache, f"encoder.cached={cached}")
    accelerator = distributed.start(config.run_dir, [], tf32=False)
    run = Training(config, accelerator, train_repae.train_step, real_data=True)
    rows = next(run.batches)[2:]
    assert [row.shape[2:] for row in rows] == [(2, 4, 8, 8), (16, 192)][: 1 + (cached == "true")]
    assert all(value.isfinite() for value in run.step(PhaseClock(accelerator.device)).values())


def test_cached_tokens_are_those_of_the_encoder(images, vae, tmp_path, monkeypatch):
    """Of the image and of its mirror image, to float16."""
    net = timm.create_model("test_resnet", num_classes=0)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    given = ["--encoders", "timm:test_resnet/16", "--encoder-weights", tmp_path / "net.safetensors"]
    cache_here(monkeypatch, images, vae, tmp_path / "c", "--hflip", *given, "--encoder-grid", 4)
    encoder = load_encoder("timm:test_resnet/16", tmp_path / "net.safetensors", 16, 4)
    source = open_source("folder", images, 16)
    x = u8_to_pm1(torch.stack([source[i][0] for i in range(NUM)]))
    file = LatentCache(tmp_path / "c")
    feats = torch.stack([file.read("features-0", i) for i in range(NUM)]).float()
    assert file.encoder_dims() == (encoder.embed_dim,)
    for copy, pixels in enumerate((x, x.flip(-1))):
        torch.testing.assert_close(feats[:, copy], encoder(pixels), rtol=2e-3, atol=2e-3)


def test_statistics_are_those_of_posterior_samples(images, vae, cache):
    """In expectation; the latent norm of a run starts with them, and keeps them."""
    file, net = LatentCache(cache), load_vae(str(vae))
    mean, std = file.stats()
    source = open_source("folder", images, 16)
    x = u8_to_pm1(torch.stack([source[i][0] for i in range(NUM)]))
    with torch.no_grad():
        posterior = net.encode(torch.cat([x, x.flip(-1)]))
    draws = torch.stack([posterior.sample().double() for _ in range(30)])
    torch.testing.assert_close(draws.mean((0, 1, 3, 4)), mean, atol=5e-3, rtol=0)
    torch.testing.assert_close(draws.std((0, 1, 3, 4)), std, atol=5e-3, rtol=0)
    _, _, nets = one_step(config_of(images, vae, cache), images)
    torch.testing.assert_close(nets.sit.bn.running_mean, mean.float())
    torch.testing.assert_close(nets.sit.bn.running_var, std.float().square())


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


def test_an_image_removed_or_added_is_refused_by_name(images, vae, cache, tmp_path):
    names = sorted(p.relative_to(images) for p in images.rglob("*.png"))
    for name in names[1:]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((images / name).read_bytes())
    config = config_of(tmp_path, vae, cache)
    text = refusal(lambda: examples_of(config, tmp_path))
    assert f"latents without an image: 1 (first {names[0]})" in text and "40 images" in text
    (tmp_path / "a" / "new.png").write_bytes((images / names[0]).read_bytes())
    text = refusal(lambda: examples_of(config, tmp_path))
    assert "images without latents: 1 (first a/new.png)" in text


def replace_unsampled(folder: Path) -> Path:
    """Invert a picture whose pixels are not among those that are compared at every start."""
    sampled = np.linspace(0, NUM - 1, latents.CHECKED_IMAGES, dtype=int)
    source = open_source("folder", folder, 16)
    path = folder / source.key(min({*range(NUM)} - {*sampled.tolist()}))
    picture = 255 - np.array(Image.open(path))
    Image.fromarray(picture).save(path)
    return path


def test_other_pixels_under_the_same_names_are_refused(images, vae, plain, tmp_path):
    """All of them, or one, by a run and by the command that made the cache; a dry run of what is on
    another machine reads no more than some images."""
    shutil.copytree(images, tmp_path / "images")
    config = config_of(tmp_path / "images", vae, plain)
    replace_unsampled(tmp_path / "images")
    assert "made from other images: the pixels of" in refusal(lambda: check_run(config, 1))
    check_run(config, 1, assume_data=True)
    again = words(tmp_path / "images", vae, plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [SCRIPT, *again])
        assert "was begun with other images" in refusal(cache_latents.main)
    for path in (tmp_path / "images").rglob("*.png"):
        Image.fromarray(np.array(Image.open(path)) // 2).save(path)
    text = refusal(lambda: examples_of(config, tmp_path / "images"))
    assert "made from other images: the pixels of" in text


def test_the_same_pixels_may_be_in_another_container(images, plain, tmp_path, monkeypatch):
    """Packed data of the folder that was cached: by the hash of all pixels, no image is read. Where
    that is not known, all are compared."""
    prepare_data.main([str(images), str(tmp_path / "p"), "--resolution", "16", "--workers", "0"])
    packed, folder = open_source("packed", tmp_path / "p", 16), open_source("folder", images, 16)
    cache = LatentCache(plain)
    rows = cache.join(packed)
    compared = []
    monkeypatch.setattr(LatentCache, "_compare", lambda *given: compared.append(given))
    cache.check_content(packed, rows, packed.fingerprint())
    cache.check_content(folder, rows, folder.fingerprint())
    assert not compared
    cache.check_content(packed, rows, "another")
    cache.check_content(packed, rows[::-1], packed.fingerprint())
    assert [len(indices) for *_, indices in compared] == [NUM, NUM]


def test_pictures_that_are_replaced_while_they_are_cached(images, vae, tmp_path, monkeypatch):
    shutil.copytree(images, tmp_path / "images")
    write = CacheWriter.write

    def write_and_replace(*arguments, **named):
        write(*arguments, **named)
        replace_unsampled(tmp_path / "images")

    monkeypatch.setattr(CacheWriter, "write", write_and_replace)
    text = refusal(lambda: cache_here(monkeypatch, tmp_path / "images", vae, tmp_path / "c"))
    assert "the data have changed while" in text


def test_rows_follow_their_keys_not_their_order(images, vae, cache, tmp_path):
    """The same images under the same keys, listed in another order."""
    source = open_source("folder", images, 16)

    class Shuffled(Source):
        """It does not know its labels without reading the images."""

        order = np.random.RandomState(0).permutation(NUM).tolist()
        classes = source.classes

        def __len__(self):
            return NUM

        def __getitem__(self, i):
            return source[self.order[i]]

        def key(self, i):
            return source.key(self.order[i])

    plain = CachedSource(source, LatentCache(cache), features=False, pixels=False)
    shuffled = CachedSource(Shuffled(None, 16), LatentCache(cache), features=False, pixels=False)
    for i in range(NUM):
        for a, b in zip(shuffled[i], plain[Shuffled.order[i]]):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_another_vae_is_refused_by_name(images, vae, cache, tmp_path):
    torch.manual_seed(4)
    build_vae("tiny-f2d4").save(tmp_path)
    config = config_of(images, tmp_path, cache)
    text = refusal(lambda: one_step(config, images))
    assert "made with another VAE" in text and str(vae) in text and str(tmp_path) in text
    text = refusal(lambda: check_run(config, 1, assume_data=True))  # also a dry run
    assert "made with another VAE" in text and str(tmp_path) in text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ("data.resolution=32", "encoder.grid=8"),
            "resolution 16; cache again, or set data.resolution=16",
        ),
        (("encoder.cached=true", "encoder.grid=2"), "tokens"),
        (("encoder.cached=true", "encoder.names=[timm:test_vit]"), "timm:test_vit"),
        (("encoder.cached=true", "encoder.weights=[]"), "'published'"),
    ],
)
def test_other_settings_are_refused(images, vae, cache, more, said):
    config = config_of(images, vae, cache, *more)
    assert said in refusal(lambda: examples_of(config, images))


def test_few_files_are_open_at_a_time(cache, monkeypatch):
    """Every memory map holds a file descriptor, and ImageNet has hundreds of shards."""
    monkeypatch.setattr(latents, "OPEN_FILES", 2)
    few, many = LatentCache(cache), latents_without_limit(cache)
    for row in (0, 39, 17, 1, 38):
        for name in few.arrays:
            assert torch.equal(few.read(name, row), many[name][row])
        assert sum(len(rows._maps) for rows in few._rows.values()) <= 2


def latents_without_limit(cache) -> dict[str, torch.Tensor]:
    """Name of an array => all its rows."""
    names = ("latents", "features-0")
    files = {name: sorted(cache.glob(f"{name}-*.npy")) for name in names}
    return {n: torch.from_numpy(np.concatenate([np.load(f) for f in files[n]])) for n in names}


def test_mirrored_training_needs_mirrored_copies(images, vae, plain):
    config = config_of(images, vae, plain, "data.hflip=true")
    assert "--hflip" in refusal(lambda: examples_of(config, images))


def test_unfinished_other_crop_and_cut_caches_are_refused(images, vae, tmp_path, monkeypatch):
    out = tmp_path / "c"
    cache_here(monkeypatch, images, vae, out)
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps(meta | {"crop_version": "other"}))
    assert "crop_version other" in refusal(lambda: LatentCache(out))
    (out / "meta.json").write_text(json.dumps(meta))
    with (out / "latents-00001.npy").open("r+b") as file:
        file.truncate(500)
    assert "latents-00001.npy is cut short" in refusal(lambda: LatentCache(out))
    (out / "meta.json").unlink()
    assert "is unfinished: run the same" in refusal(lambda: LatentCache(out))
    assert "no such folder; correct the path" in refusal(lambda: LatentCache(out / "typo"))
    cache_here(monkeypatch, images, vae, out)  # mends both
    assert len(LatentCache(out)) == NUM


def test_one_folder_never_mixes_two_caches(images, vae, tmp_path, monkeypatch):
    cache_here(monkeypatch, images, vae, tmp_path / "c")
    torch.manual_seed(4)
    build_vae("tiny-f2d4").save(tmp_path / "other")
    again = [
        ((images, tmp_path / "other"), (), "vae_sha256"),
        ((images, vae), ("--hflip",), "copies"),
        ((images / "a", vae), (), "num_images"),
    ]
    for (path, net), more, named in again:
        text = refusal(
            lambda p=path, n=net, m=more: cache_here(monkeypatch, p, n, tmp_path / "c", *m)
        )
        assert f"was begun with {named}" in text


def content(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".npy", ".txt")}


SLOW = ("--batch-size", 1, "--shard-size", 4)


@pytest.fixture(scope="module")
def undisturbed(images, vae, tmp_path_factory):
    """The cache of ten small shards, made at one go."""
    out = tmp_path_factory.mktemp("undisturbed") / "c"
    with pytest.MonkeyPatch.context() as patch:
        cache_here(patch, images, vae, out, *SLOW)
    return out


def check_same_cache(found, expected) -> None:
    """Byte for byte; meta.json also says which commit made it."""
    assert content(found) == content(expected)
    metas = [json.loads((f / "meta.json").read_text()) for f in (found, expected)]
    assert [metas[0][k] == metas[1][k] for k in ("mean", "std", "shards")] == [True] * 3


def test_a_killed_run_is_continued(images, vae, undisturbed, tmp_path, monkeypatch):
    """kill -9 while it writes, then the same command: as if nothing had happened."""
    out = tmp_path / "c"
    command = [sys.executable, SCRIPT, *words(images, vae, out, *SLOW)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(out.glob("shard-*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "meta.json").exists()
    before = {p: p.stat().st_mtime_ns for p in out.glob("shard-*.json")}
    cache_here(monkeypatch, images, vae, out, *SLOW)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    check_same_cache(out, undisturbed)


@pytest.mark.slow
def test_two_ranks_finish_what_one_began(images, vae, undisturbed, tmp_path):
    """Each keeps to its own shards; an array without its record is written again."""
    out = tmp_path / "c"
    shutil.copytree(undisturbed, out)
    for name in ("meta.json", "keys.txt", *(f"shard-0000{k}.json" for k in (1, 2, 5, 6, 7))):
        (out / name).unlink()
    before = {p: p.stat().st_mtime_ns for p in out.glob("shard-*.json")}
    done = run_script(SCRIPT, *words(images, vae, out, *SLOW), ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(before) == 5 and all(p.stat().st_mtime_ns == t for p, t in before.items())
    check_same_cache(out, undisturbed)


def test_disk_need_is_said_first_and_enforced(images, vae, tmp_path, monkeypatch, capsys):
    """40 images x 2 copies x (2 x 4 x 8 x 8 latents + 16 x D tokens) x 2 bytes."""
    cache_here(monkeypatch, images, vae, tmp_path / "c", "--hflip", *ENCODER, "--dry-run")
    _, dim = encoder_shape("timm:test_resnet/16", 16, 4)
    need = NUM * 2 * (2 * 4 * 8 * 8 + 16 * dim) * 2
    assert f"{need / 2**20:.2f} MiB still to write" in capsys.readouterr().out
    assert not (tmp_path / "c").exists()


def test_training_from_the_cache_resumes_and_draws_pictures(images, vae, cache, tmp_path, capsys):
    """The script itself: previews through the VAE, checkpoints, the record of the statistics."""
    more = [f"data.latents={cache}", f"vae.name={vae}", "vae.weights=hub", "vae.train=false"]
    more += ["data.source=folder", f"data.path={images}", "encoder.cached=true"]
    more += ["preview.every=2", "preview.num=4", "preview.steps=2"]
    assert train_here(tmp_path, *more, "run.steps=2") == 0
    assert train_here(tmp_path, *more) == 0
    run = tmp_path / "tiny"
    assert (run / "samples" / "0000004.png").exists()
    record = json.loads((run / "latent_stats.json").read_text())
    assert str(cache) in record["origin"]
    saved = load_vae(str(run / "checkpoints" / "0000004")).latent_stats()
    expected = (LatentCache(cache).stats()[1].square() + 1e-4).sqrt().float()
    torch.testing.assert_close(saved[1], expected)
    assert train_here(tmp_path, *more, "vae.train=true") == 2
    assert "data.latents" in capsys.readouterr().err


def test_the_checksum_sees_every_pixel():
    x = torch.zeros(3, 4, 4, dtype=torch.uint8)
    y = x.clone()
    y[2, 3, 3] = 1
    assert checksum(x) != checksum(y) and checksum(x) == checksum(x.clone())


def test_the_checksum_does_not_see_the_memory_layout():
    """Caches were made with batches of (3, H, W) memory, and with batches of (H, W, 3) memory."""
    x = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    nhwc = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert checksum(nhwc) == checksum(x) == zlib.crc32(bytes(range(48)))


def test_a_cache_of_an_earlier_version_is_compared_as_a_whole(images, vae, plain, tmp_path):
    """It has checksums of all images, but no hash of the data: it is not continued, and at the
    start of a run all images are read."""
    old, replaced = tmp_path / "old", tmp_path / "images"
    shutil.copytree(plain, old)
    for name in ("plan.json", "meta.json"):
        record = json.loads((old / name).read_text())
        for key in ("images_sha256", "pixels_sha256"):
            record.pop(key, None)
        (old / name).write_text(json.dumps(record))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [SCRIPT, *words(images, vae, old)])
        assert "by an earlier version, without a hash" in refusal(cache_latents.main)
    examples = examples_of(config_of(images, vae, old), images)
    examples.check_content(examples.images.fingerprint())
    shutil.copytree(images, replaced)
    examples = examples_of(config_of(replaced, vae, old), replaced)
    replace_unsampled(replaced)
    text = refusal(lambda: examples.check_content(examples.images.fingerprint()))
    assert "made from other images: the pixels of" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"moments": [[1.0], [2.0], [3.0]]},
        {"moments": [[1.0] * 4] * 2},
        {"moments": []},
        {"hashes": "0" * 63},
        {"hashes": "x" * 64 * 16},
        {},  # fewer checksums
        {"moments": [[0.0] * 4, [0.0] * 4, [0.0] * 3]},
    ],
)
def test_a_record_of_another_shard_is_refused(images, vae, plain, tmp_path, monkeypatch, changes):
    out = tmp_path / "c"
    shutil.copytree(plain, out)
    record = out / "shard-00001.json"
    held = json.loads(record.read_text())
    changes = changes or {"checksums": held["checksums"][:3]}
    record.write_text(json.dumps(held | changes))
    with pytest.raises(UserError, match=r"delete (it|shard-00001\.json).*same command again"):
        cache_here(monkeypatch, images, vae, out)


def keys_of(images) -> list[str]:
    return sorted(p.relative_to(images).as_posix() for p in images.rglob("*.png"))


BAD_VALUES = [None, True, "x", -1, 2.5, 10**30, [], [1], {}, [[1]], ["x"], [float("nan")] * 4]


@pytest.mark.parametrize("key", [declared.name for declared in fields(CacheMeta)])
def test_a_meta_that_does_not_fit_is_refused(images, vae, cache, tmp_path, key):
    shutil.copytree(cache, tmp_path / "c")
    meta = json.loads((cache / "meta.json").read_text())
    texts, lists = ("vae", "vae_sha256", "images_sha256", "pixels_sha256"), ("encoders",)
    for value in BAD_VALUES:
        absent = value is None and key in texts[2:]
        if absent or (key in texts and value == "x") or (key in lists and value == []):
            continue  # these are other caches, and no bad ones
        (tmp_path / "c/meta.json").write_text(json.dumps(meta | {key: value}))
        with pytest.raises(UserError) as error:
            LatentCache(tmp_path / "c")
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    (tmp_path / "c/meta.json").write_text(json.dumps({k: meta[k] for k in meta if k != key}))
    if key not in texts[2:]:  # which caches of earlier versions lack
        with pytest.raises(UserError, match=f"{key} is missing"):
            LatentCache(tmp_path / "c")


@pytest.mark.parametrize("encoder", [7, {}, {"name": "x"}, {"name": 1, "weights": "x"}])
def test_encoders_of_a_meta_that_do_not_fit_are_refused(cache, tmp_path, encoder):
    shutil.copytree(cache, tmp_path / "c")
    meta = json.loads((cache / "meta.json").read_text())
    (tmp_path / "c/meta.json").write_text(json.dumps(meta | {"encoders": [encoder]}))
    with pytest.raises(UserError, match=r"meta\.json: encoders\[0\]"):
        LatentCache(tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("checksums.npy", np.zeros(NUM)),
        ("checksums.npy", np.zeros(NUM + 1, np.uint32)),
        ("checksums.npy", np.array([{}] * NUM, object)),
        ("checksums.npy", b""),
        ("checksums.npy", None),
        ("keys.txt", b"a\n"),
        ("keys.txt", b""),
        ("keys.txt", b"a\n" * NUM),
        ("keys.txt", None),
        ("latents-00001.npy", b"text"),
        ("latents-00001.npy", None),
        ("latents-00001.npy", np.zeros((16, 2, 2, 4, 8, 8), np.float32)),
        ("features-0-00002.npy", np.zeros((8, 2, 16, 7), np.float16)),
        ("meta.json", b"[]"),
        ("meta.json", b"\xff\xfe"),
        ("meta.json", None),
    ],
    ids=str,
)
def test_files_that_no_cache_holds(images, vae, cache, tmp_path, name, content):
    shutil.copytree(cache, tmp_path / "c")
    (tmp_path / "c" / name).unlink()
    if isinstance(content, np.ndarray):
        np.save(tmp_path / "c" / name, content, allow_pickle=True)
    elif content is not None:
        (tmp_path / "c" / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        examples_of(config_of(images, vae, tmp_path / "c"), images)
    assert "\n" not in str(error.value)


def test_what_is_no_cache_is_called_what_it_is(images, vae, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    words = {"file": "a text file", "none": "no such folder", "empty": "not found"}
    for name, word in words.items():
        with pytest.raises(UserError, match=word):
            LatentCache(tmp_path / name)


def test_places_for_a_cache_that_are_refused(images, vae, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for out, word in {images / "c": "lies inside", tmp_path / "file": "file"}.items():
        with pytest.raises(UserError, match=word):
            cache_here(monkeypatch, images, vae, out)


def test_an_image_that_broke_after_the_latents_were_cached(images, vae, cache, tmp_path):
    """Its place takes another one, with the latents of that one."""
    shutil.copytree(images, tmp_path / "images")
    config = config_of(tmp_path / "images", vae, cache, f"encoder.grid={4}", "loss.align.sit=0.5")
    source = open_source("folder", tmp_path / "images", 16)
    (source.root / source.key(0)).write_bytes(b"broken")
    source.bad = BadImages(9)
    examples = join_cache(config, source)
    assert examples.pixels
    for found, expected in zip(examples.take(0), examples.take(1)):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    assert [*source.bad.reasons] == [source.key(0)]
