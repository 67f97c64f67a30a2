"""Reading ahead in threads: the same images in the same order, each once, and an end without delay.

python -m pytest tests/utils/evaluation/test_reader.py
"""

import threading
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from evaluate_fid import progress_bars
from models.checks.errors import UserError
from tests.random_inception import textures
from tests.utils.evaluation.toy_network import toy_net
from utils.distributed import Ranks
from utils.evaluation.evaluate import evaluate
from utils.evaluation.formulas.frechet import frechet_between
from utils.evaluation.images.image_sets import open_images, subset
from utils.evaluation.images.npz_images import ArrayImages
from utils.evaluation.images.reader import read_ahead
from utils.evaluation.networks import _pil_resize
from utils.evaluation.options import Options
from utils.evaluation.statistics import Collector, collect, share_hashes

ALONE = Ranks(distributed=False)
BLOCKS = [(start, start + 4) for start in range(0, 40, 4)]


class Watched(ArrayImages):
    """Notes how often every image is read, by which threads, and in which order."""

    def __init__(self, pictures: np.ndarray, delay: float = 0):
        super().__init__(pictures, "watched", "array")
        self.reads, self.threads, self.starts = np.zeros(len(pictures), int), set(), []
        self.delay = delay

    def read(self, start: int, stop: int) -> np.ndarray:
        time.sleep(self.delay * (start % 8))
        self.starts.append(start)
        self.reads[start:stop] += 1
        self.threads.add(threading.current_thread())
        return super().read(start, stop)


@pytest.fixture
def pictures():
    rng = np.random.Generator(np.random.PCG64(0))
    return rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("reader")]


def test_many_threads_read_and_the_order_stays(pictures):
    images = Watched(pictures, delay=0.005)
    found = torch.cat([*read_ahead(images, BLOCKS, workers=3)])
    assert torch.equal(found, torch.from_numpy(pictures).permute(0, 3, 1, 2))
    assert len(images.threads) == 3 and threading.main_thread() not in images.threads
    assert not readers()


def test_no_more_blocks_are_in_memory_than_threads_and_one(pictures):
    images = Watched(pictures)
    with closing(read_ahead(images, BLOCKS, workers=2)) as batches:
        next(batches)
        time.sleep(0.1)
        assert len(images.starts) == 3
    assert not readers()


def test_what_decompresses_in_order_is_read_by_one_thread(tmp_path, pictures):
    np.savez_compressed(tmp_path / "c.npz", pictures)
    for images in (open_images(tmp_path / "c.npz"), subset(open_images(tmp_path / "c.npz"), 39)):
        read, starts = images.read, []
        images.read = lambda a, b, read=read, starts=starts: starts.append(a) or read(a, b)
        found = torch.cat([*read_ahead(images, BLOCKS[:9], workers=8)])
        assert starts == [a for a, _ in BLOCKS[:9]] and len(found) == 36


def test_images_are_read_once_to_be_measured_and_hashed(pictures):
    images, net = Watched(pictures), toy_net()
    record = evaluate(images, None, Options(metrics=("is",), batch_size=7), net=net, ranks=ALONE)
    assert (images.reads == 1).all()
    assert record["samples"]["content_sha256"] == open_images(pictures).fingerprint()
    reference = Watched(pictures ^ 1)  # its hash is needed first, to find what is known of it
    evaluate(pictures, reference, Options(metrics=("fid",), cache=None), net=net, ranks=ALONE)
    assert (reference.reads == 2).all()


def test_ranks_share_what_they_have_hashed(pictures):
    """The main process has read the first half; another one the second, and the first image."""
    own, other = Watched(pictures), Watched(pictures)
    own.note(0, pictures[:20])
    other.note(20, pictures[20:])
    other.note(0, pictures[:1])
    ranks = Ranks(distributed=False)
    ranks.world, ranks.sum = 2, lambda hashes: hashes + torch.from_numpy(other.hashes)
    share_hashes(own, ranks)
    assert own.fingerprint() == open_images(pictures).fingerprint()
    assert not own.reads.any()


def test_a_network_may_have_images_prepared_by_the_readers(pictures):
    (found,) = read_ahead(open_images(pictures), [(0, 4)], prepare=_pil_resize)
    to, rule = (224, 224), Image.Resampling.BICUBIC
    expected = [np.array(Image.fromarray(picture).resize(to, rule)) for picture in pictures[:4]]
    assert np.array_equal(found.permute(0, 2, 3, 1), np.stack(expected))
    net, threads = toy_net(), set()
    net.prepare = lambda block: threads.add(threading.current_thread().name) or 255 - block
    (first,) = collect(open_images(pictures), net, ["pool"], ALONE, batch_size=16).values()
    again = net(torch.from_numpy(pictures).permute(0, 3, 1, 2))["pool"].double().mean(0)
    np.testing.assert_allclose(first.mean, again, rtol=1e-12)
    assert any(name.startswith("reader") for name in threads)


def test_a_damaged_picture_is_named_and_the_threads_end(tmp_path, pictures):
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    (tmp_path / "21.png").write_bytes((tmp_path / "21.png").read_bytes()[:200])
    done, options = [], Options(metrics=("is",), batch_size=4, cache=None)
    with pytest.raises(UserError, match=r"21\.png"):
        evaluate(tmp_path, None, options, net=toy_net(), ranks=ALONE,
                 progress=lambda what: lambda *numbers: done.append(numbers))  # fmt: skip
    assert done == [(number, 40) for number in (4, 8, 12, 16, 20)]
    assert not readers()


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_an_error_between_two_batches_ends_the_threads(pictures, error):
    net = toy_net()

    def interrupted(x):
        raise error

    net.forward = interrupted
    with pytest.raises(error):
        collect(open_images(pictures), net, ["pool"], ALONE, batch_size=4, workers=4)
    assert not readers()


def test_a_bar_is_gone_before_anything_else_is_said(capsys):
    def fail():
        with progress_bars(ALONE) as progress:
            for what in ("reference", "samples"):
                progress(what)(3, 9)
            assert "samples: " in capsys.readouterr().err
            raise UserError("x")

    with pytest.raises(UserError):
        fail()
    assert capsys.readouterr().err.endswith("\r")  # the line is blank again


@pytest.mark.parametrize("groups", [2, 3])
def test_groups_are_disjoint_and_equally_large(groups):
    x = textures(40, 1, 16).double().flatten(1)[:, :5] / 255
    collector = Collector(40, 5, ALONE, keep_rows=True, groups=groups)
    for start in range(0, 40, 16):
        collector.add(x[start : start + 16], start, 16)
    found = collector.result()
    np.testing.assert_allclose(found.cov, np.cov(x, rowvar=False), rtol=1e-10)
    assert [each.n for each in found.groups] == {2: [20, 20], 3: [14, 13, 13]}[groups]
    for number, each in enumerate(found.groups):
        rows = x.numpy()[collector.group == number]
        np.testing.assert_allclose(each.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(each.cov, np.cov(rows, rowvar=False), rtol=1e-10)
        assert np.array_equal(each.rows, rows.astype(np.float32))
    assert found.floor == (frechet_between(*found.groups) if groups == 2 else None)
