"""Which numbers may stand beside published ones: all of the protocol, or a reason for each metric.

python -m pytest tests/utils/evaluation/test_comparable.py
"""

import copy
import re

import numpy as np
import pytest
from PIL import Image

from models.lpips import VGG
from models.vae import load_vae
from tests.random_inception import textures
from tests.utils.evaluation.toy_network import toy_net
from utils.distributed import Ranks
from utils.evaluation import comparable
from utils.evaluation.comparable import VALIDATION, assess, is_validation_set
from utils.evaluation.evaluate import evaluate
from utils.evaluation.images.image_sets import open_images
from utils.evaluation.options import Options
from utils.evaluation.reconstruction import evaluate_vae
from utils.evaluation.references.known import KNOWN

ALONE = Ranks(distributed=False)
(ADM,) = [sha256 for sha256, each in KNOWN.items() if each.of_adm_suite]
OTHER = next(sha256 for sha256, each in KNOWN.items() if not each.of_adm_suite)
NAMES = {"gFID-50K": "fid", "sFID-50K": "sfid", "IS-50K": "is", "precision": "precision",
         "recall": "recall"}  # fmt: skip
FULL = {
    "n": 50_000,
    "metrics": dict.fromkeys(NAMES, 100.0),
    "details": {"IS-50K": {"shuffled": 101.0}},
    "features": {"label": "inception", "published_weights": True},
    "samples": {"size": [256, 256], "record": None, "content_sha256": "a", "lossy": False,
                "copies": 0},
    "reference": {"file_sha256": ADM, "content_sha256": "b"},
    "protocol": {"precision_recall": {"k": 3, "mode": "adm_fp16", "n_reference": 10_000}},
}  # fmt: skip
ALL, DISTANCES = set(NAMES), {"gFID-50K", "sFID-50K", "precision", "recall"}
MANIFOLDS = {"precision", "recall"}


def judged(names=NAMES, **changes) -> dict:
    """The full protocol of papers, with `part__key=value` changed."""
    record = copy.deepcopy(FULL)
    for name, value in changes.items():
        *parts, key = name.split("__")
        place = record
        for part in parts:
            place = place[part]
        place[key] = value
    assess(record, names)
    return record


def sampled(**settings) -> dict:
    return {"samples__record": {"settings": {"solver": "sde", **settings}}}


def test_the_whole_protocol_is_comparable():
    record = judged()
    assert record["comparable_to_papers"] is True and record["not_comparable_because"] == []
    assert record["comparability"] == {name: [] for name in NAMES}
    assert judged(**sampled(resolution=256, num_samples=50_000))["comparable_to_papers"]


NOT = {
    "49999 images, not 50000": (ALL, {"n": 49_999}),
    "is not a network of published": (ALL, {"features__published_weights": False}),
    "of clip features is published": (ALL, {"features__label": "clip"}),
    "copies of others was not seen": (ALL, {"samples__copies": None}),
    "read as training data": (ALL, {"samples__kind": "source"}),
    "stored with loss": (ALL, {"samples__lossy": True}),
    "49999 of the images are copies": (ALL, {"samples__copies": 49_999}),
    "samples and reference are the same": (ALL, {"reference__content_sha256": "a"}),
    "8 chosen classes": (ALL, sampled(classes=[1] * 8)),
    "says 512 px, they have 256": (ALL, sampled(resolution=512)),
    "says 10000 images, they have 50000": (ALL, sampled(num_samples=10_000)),
    "computed here from images": (DISTANCES, {"reference": {"name": "digits"}}),
    "is that of no published file known here": (DISTANCES, {"reference__file_sha256": "0" * 64}),
    "compare only with numbers": (DISTANCES, {"reference__file_sha256": OTHER}),
    "images of 64x64 pixels, the reference is of 256": (DISTANCES, {"samples__size": [64, 64]}),
    "none is known of 512 px": (
        DISTANCES, {"samples__size": [512, 512], "reference__file_sha256": "0" * 64},
    ),
    "in file order of sorted samples": ({"IS-50K"}, {"details__IS-50K__shuffled": 300.0}),
    "distances fp32, not adm_fp16": (MANIFOLDS, {"protocol__precision_recall__mode": "fp32"}),
    "50000 reference images, not 10000": (
        MANIFOLDS, {"protocol__precision_recall__n_reference": 50_000},
    ),
    "5th neighbour, not 3": (MANIFOLDS, {"protocol__precision_recall__k": 5}),
}  # fmt: skip


@pytest.mark.parametrize("why", NOT)
def test_each_deviation_is_a_reason_against_the_metrics_that_it_is_about(why):
    about, changes = NOT[why]
    record = judged(**changes)
    against = {
        name for name, found in record["comparability"].items() if any(why in r for r in found)
    }
    assert against == about
    assert record["comparable_to_papers"] is False
    said = " ".join(line for line in record["not_comparable_because"] if why in line)
    assert about == ALL or all(name in said for name in about)


def test_the_inception_score_needs_no_reference():
    record = judged({"IS-50K": "is"}, reference=None)
    assert record["comparable_to_papers"] is True


def test_a_metric_whose_protocol_is_not_published_is_never_comparable(monkeypatch):
    monkeypatch.delitem(comparable.OF_METRIC, "sfid")
    record = judged()
    assert record["comparability"]["sFID-50K"] == [
        "no published protocol of sFID-50K is followed here"
    ]
    assert record["comparability"]["gFID-50K"] == []


def test_fd_dinov2_is_compared_by_its_own_count_of_reals_and_resize():
    def reasons(**changes):
        record = judged({"FD-DINOv2-50K": "fid"}, features__label="dinov2", **changes)
        assert record["comparable_to_papers"] is False
        return " ".join(record["not_comparable_because"])

    assert "not known here" in reasons() and "an unknown number" in reasons()
    n = {"details": {"FD-DINOv2-50K": {"n_reference": 50_000}}}
    assert "dgm-eval takes" not in reasons(**n)
    assert "10000 images, dgm-eval takes 50000" in reasons(
        details={"FD-DINOv2-50K": {"n_reference": 10_000}}
    )
    assert "resized by torch" in reasons(reference={"resized_by": "torch bicubic"}, **n)


OF_VAE = {"rFID-50K": "rfid", "PSNR": "psnr", "LPIPS": "lpips"}


def test_of_a_vae_only_the_validation_set_under_its_own_names_counts():
    published = {"protocol__lpips_weights_sha256": VGG.sha256 + "0" * 56}
    record = judged(OF_VAE, protocol__images=VALIDATION, **published)
    assert record["comparable_to_papers"] is True
    record = judged(OF_VAE, protocol__images=VALIDATION)
    assert {name for name, found in record["comparability"].items() if found} == {"LPIPS"}
    record = judged(OF_VAE | {"SSIM": "ssim"}, protocol__images=VALIDATION, **published)
    assert {name for name, found in record["comparability"].items() if found} == {"SSIM"}
    assert "up to 0.006" in record["not_comparable_because"][0]
    for changes in ({"protocol__images": "others"}, {"samples__size": [512, 512]}, {"n": 49_999}):
        record = judged(OF_VAE, **{"protocol__images": VALIDATION} | changes)
        assert all(record["comparability"].values())


def test_names_of_the_validation_set(monkeypatch):
    monkeypatch.setattr(comparable, "PAPER_SIZE", 50)
    names = [f"n{i % 7:08d}/ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(50)]
    assert is_validation_set(names)
    assert is_validation_set(reversed(names))
    assert not is_validation_set(names[1:])
    assert not is_validation_set([*names[1:], names[1]])
    assert not is_validation_set([*names[1:], "ILSVRC2012_val_00000051.JPEG"])
    assert not is_validation_set([*names, "more.JPEG"])
    assert not is_validation_set(f"{i}.JPEG" for i in range(1, 51))


def test_what_a_run_records_is_what_is_judged(tmp_path):
    """Copies among the samples, lossy files, a reference of images; and images of a VAE."""
    x = textures(12, 1, 16)
    folder = tmp_path / "jpeg"
    folder.mkdir()
    for i, image in enumerate(x.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{i}.jpg")
    options = Options(metrics=("fid", "precision"), cache=None)
    for samples, copies in ((x, 0), (x[:1].expand(12, -1, -1, -1), 11), (folder, 0)):
        record = evaluate(samples, x, options, net=toy_net(), ranks=ALONE)
        assert record["samples"]["copies"] == copies
        assert record["samples"]["lossy"] is (samples is folder)
        text = " ".join(record["not_comparable_because"])
        for word, there in (
            ("copies", copies),
            ("loss", samples is folder),
            ("same images", samples is x),
        ):
            assert bool(re.search(word, text)) == bool(there), (word, text)
    images = open_images(x)
    record = evaluate_vae(load_vae("tiny-f8d4", None), images,
                          Options(metrics=("psnr", "ssim", "latents")), ranks=ALONE)  # fmt: skip
    assert set(record["comparability"]) == {"PSNR", "SSIM"}
    assert "not known to be ImageNet's validation set" in record["not_comparable_because"][1]
    assert np.isfinite(record["metrics"]["PSNR"])
