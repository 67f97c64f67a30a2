"""The commands that sample and evaluate the last checkpoint of a run, ready to be copied."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from models.weights.published import WeightFile
from utils.config.schema import Config
from utils.data.base import Source
from utils.distributed import default_device
from utils.evaluation.images.naming import spec_of_data
from utils.evaluation.options import PUBLISHED, REFERENCES, Options
from utils.precision import effective_precision
from utils.sampling.labels import WORDNET_ID

MOST_SAMPLES = 50_000  # of the FID protocol
MOST_ON_CPU = 500  # more take hours
ON_CPU = ["--preset", "fast"]  # a quarter of the network calls of the published solver
IMAGENET_CLASSES = 1000


def last_words(c: Config, source: Source, checkpoint: Path) -> str:
    """What is said of a run that is done."""
    sample, evaluate = commands(c, source, checkpoint)
    remark = features(c)[1]
    return "\n".join(
        [
            f"done: the last checkpoint is {checkpoint}. These commands sample and evaluate it:",
            *("", f"    {shlex.join(sample)}", f"    {shlex.join(evaluate)}", ""),
            *([remark, ""] if remark else []),
        ]
    )


def commands(c: Config, source: Source, checkpoint: Path) -> tuple[list[str], list[str]]:
    """The words of sample_ddp.py and of evaluate_fid.py, for as many ranks as this machine had."""
    samples = Path("samples") / f"{c.run.name}-{checkpoint.name}.npz"
    sample = [*program("sample_ddp.py"), "--checkpoint", str(checkpoint), "--out", str(samples)]
    sample += ["--num-samples", str(num_samples(source)), "--class-balanced"]
    if default_device().type == "cpu":
        sample += ON_CPU
    if effective_precision(c.run.precision, default_device()) == "fp32":
        sample += ["--precision", "fp32"]
    if c.eval.cfg_scale != 1 and c.sit.class_dropout_prob:
        sample += ["--cfg-scale", f"{c.eval.cfg_scale:g}"]
    evaluate = [*program("evaluate_fid.py"), "--samples", str(samples)]
    evaluate += ["--reference", reference(c, source)]
    # in the run's folder, where the report finds it
    evaluate += ["--out", str(c.run_dir / f"evaluation-{checkpoint.name}.json")]
    return sample, evaluate + features(c)[0]


def program(name: str) -> list[str]:
    """What starts a program that lies beside this one, on all ranks of this machine."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1")
    launch = ["accelerate", "launch", "--multi_gpu", "--num_processes", ranks]
    return [*(["python"] if ranks == "1" else launch), str(Path(sys.argv[0]).with_name(name))]


def num_samples(source: Source) -> int:
    """As many as the data has images, at most as many as this machine makes in reasonable time, and
    equally many of each class."""
    most = MOST_ON_CPU if default_device().type == "cpu" else MOST_SAMPLES
    each = min(most, len(source)) // source.num_classes
    return max(each, 1) * source.num_classes


def features(c: Config) -> tuple[list[str], str]:
    """The flags that choose the feature network, and what has to be said of it: that of `eval.*`,
    else Inception if its weights are here, else the run's own encoder if it is a file of timm's."""
    weights = ["--weights", c.eval.weights] if c.eval.weights else []
    if c.eval.features != Options().features:
        return ["--features", c.eval.features, *weights], ""
    inception: dict[str, Any] = dict(PUBLISHED["inception"])
    if weights or WeightFile(**inception).find():
        return weights, ""
    for name, file in zip(c.encoder.names if c.uses_encoder else (), c.encoder.weights):
        if name.startswith("timm:") and file and os.path.isfile(file):
            own = f"{name.partition('/')[0]}@{file}"
            return ["--features", own], (
                f"The weights of Inception, which FID takes, are not here. {own} is the encoder of "
                "the run: its numbers compare runs with each other, not with published ones."
            )
    return ["--download"], (
        "The weights of Inception are not here: --download fetches them. Without a network, "
        "--features pixel compares runs with each other, not with published numbers."
    )


def reference(c: Config, source: Source) -> str:
    """What samples are compared with: `eval.reference`; for ImageNet the published statistics, as
    in papers; else the training images."""
    if c.eval.reference:
        return c.eval.reference
    published = REFERENCES.get(c.data.resolution)
    named = sum(bool(WORDNET_ID.fullmatch(name)) for name in source.classes)
    if published and named == source.num_classes == IMAGENET_CLASSES:
        return published
    return spec_of_data(c.data)
