"""A small timm classifier of any labelled images, to be an encoder to align with, or a judge.

The judge, of another architecture and seed than the encoder, says which class a generated image
shows, and its features measure the distance. The quickstart and the digits study have both.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save as save_tensors
from torch import Tensor

from models.checks.errors import UserError, printable, short
from models.checks.file_kinds import what_is
from models.weights.loading import load_strictly
from models.weights.reading import read_state
from utils.data.base import Source
from utils.data.images import pm1_to_01, u8_to_pm1
from utils.data.registry import open_source
from utils.evaluation.networks import read_classifier_facts
from utils.files import format_bytes, write_atomically
from utils.random import generator

HELD_OUT = 0.2  # share of each class, where the data have no test split


class Classifier:
    """A timm network fed as `models.encoders` feeds it: timm's mean and std, bicubic resize to
    `size` x `size` pixels."""

    def __init__(self, net: nn.Module, size: int):
        self.net, self.size = net, size
        cfg: Any = net.pretrained_cfg
        self.mean = torch.tensor(cfg["mean"]).view(1, 3, 1, 1)
        self.std = torch.tensor(cfg["std"]).view(1, 3, 1, 1)

    def logits(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] => (N, classes)."""
        x = (pm1_to_01(x) - self.mean) / self.std
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic")
        return self.net(x)

    def check_input(self, resolution: int) -> None:
        """`UserError` unless the network takes images that come at `resolution` pixels."""
        try:
            self.predict(torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"--size {self.size}: the network takes no such images ({short(error, 100)})"
            ) from None

    @torch.no_grad()
    def predict(self, x_u8: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 => labels (N,)."""
        self.net.eval()
        return torch.cat([self.logits(u8_to_pm1(x)).argmax(dim=1) for x in x_u8.split(256)])

    def accuracy(self, x_u8: Tensor, y: Tensor) -> float:
        """Share of the images (N, 3, H, W) uint8 whose predicted label is the one in y (N,)."""
        return (self.predict(x_u8) == y).float().mean().item()


def new_classifier(network: str, size: int, num_classes: int, seed: int) -> Classifier:
    """An untrained timm network whose initial weights depend on `seed` alone."""
    if not timm.is_model(network):
        near = ", ".join(get_close_matches(network, timm.list_models(), 3))
        raise UserError(f"--network {network!r}: timm has no such network; {near or 'see timm'}")
    torch.manual_seed(seed)
    return Classifier(timm.create_model(network, num_classes=num_classes), size)


@dataclass(frozen=True)
class Split:
    """Some of the images of a source, by their numbers."""

    source: Source
    indices: Sequence[int]

    def labels(self) -> np.ndarray:
        """(N,) int64."""
        if self.source.labels is None:
            return np.array([self.source.label(i) for i in self.indices], dtype=np.int64)
        return self.source.labels[list(self.indices)]


def hold_out(source: Source, share: float) -> tuple[Split, Split]:
    """Two parts of the images: those to train on, and `share` of each class, at least one, which
    depends on the number of its images alone. `UserError` for classes of a single image."""
    labels = Split(source, range(len(source))).labels()
    held_out = np.zeros(len(labels), dtype=bool)
    classes = [np.flatnonzero(labels == k) for k in range(source.num_classes)]
    if few := [source.classes[k] for k, members in enumerate(classes) if len(members) < 2]:
        more = f", and so have {len(few) - 1} other classes" if len(few) > 1 else ""
        raise UserError(
            f"class {printable(few[0])} has less than two images{more}: a classifier needs two or "
            "more of each class, one of them to be held out; add some, or leave such classes out"
        )
    for label, members in enumerate(classes):
        num = min(max(1, round(share * len(members))), len(members) - 1)
        order = torch.randperm(len(members), generator=generator("held out", label)).numpy()
        held_out[members[order[:num]]] = True
    train, test = (np.flatnonzero(chosen).tolist() for chosen in (~held_out, held_out))
    return Split(source, train), Split(source, test)


def check_splits(train: Split, test: Split) -> None:
    """`UserError` unless there are classes to tell apart, and no image is in both splits."""
    if train.source.num_classes < 2:
        raise UserError(
            "all images are one class: there is nothing to tell apart; give a folder of class "
            "folders, or train without an encoder (loss.align.sit=0 loss.align.vae=0)"
        )
    keys = [{split.source.key(i) for i in split.indices} for split in (train, test)]
    if both := len(keys[0] & keys[1]):
        text = f"{both:,} of the {len(keys[1]):,} images that are to be held out are trained on"
        raise UserError(
            f"{text}, too; choose other splits, or give --holdout instead of a test split"
        )
    size = sum(len(s.indices) for s in (train, test)) * 3 * train.source.resolution**2
    if size > (memory := psutil.virtual_memory().available):
        raise UserError(
            f"the images take {format_bytes(size)}, and {format_bytes(memory)} of memory are free; "
            "give a smaller --resolution, or fewer images"
        )


def read(split: Split) -> tuple[Tensor, Tensor]:
    """Images (N, 3, R, R) uint8 and labels (N,)."""
    images = torch.stack([split.source[i][0] for i in split.indices])
    return images, torch.from_numpy(split.labels())


def read_all(name: str, path: str | None, resolution: int, split: str) -> tuple[Tensor, Tensor]:
    """A whole (small) data source: images (N, 3, resolution, resolution) uint8 and labels (N,)."""
    source = open_source(name, path, resolution, split)
    return read(Split(source, range(len(source))))


def fit(
    model: Classifier, x_u8: Tensor, y: Tensor, *, steps: int, batch_size: int, lr: float, seed: int
) -> None:
    """Train with AdamW, a learning rate that falls linearly to zero, label smoothing, and small
    random affine maps of the images."""
    opt = torch.optim.AdamW(model.net.parameters(), lr=lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        opt, lr, total_steps=steps, pct_start=0.1, anneal_strategy="linear"
    )
    g = generator("classifier", seed)
    model.net.train()
    for _ in range(steps):
        chosen = torch.randint(len(y), (batch_size,), generator=g)
        logits = model.logits(random_affine(u8_to_pm1(x_u8[chosen]), g))
        loss = F.cross_entropy(logits, y[chosen], label_smoothing=0.1)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()


def random_affine(x: Tensor, g: torch.Generator) -> Tensor:
    """Rotate images (N, 3, H, W) in [-1, 1] by up to 14 degrees, scale them by up to 15 %, shift
    them by up to an eighth of a side; black comes in from outside."""
    num = len(x)
    angle = (torch.rand(num, generator=g) - 0.5) * 0.5
    scale = 1 + (torch.rand(num, generator=g) - 0.5) * 0.3
    shift = (torch.rand(num, 2, generator=g) - 0.5) * 0.25
    cos, sin = angle.cos() * scale, angle.sin() * scale
    top, bottom = torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)
    field = F.affine_grid(torch.stack([top, bottom], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, field, align_corners=False) - 1  # black is -1, padding 0


def save(classifier: Classifier, facts: dict, path: Path) -> None:
    """Write a timm state dict with its head; `facts` (network, size, ...) go into the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"classifier": json.dumps(facts)}
    write_atomically(path, save_tensors(classifier.net.state_dict(), metadata))


def load(path: Path) -> tuple[Classifier, dict]:
    """What `save` wrote: the classifier and its facts. `UserError` for any other file."""
    remedy = "train one with scripts/train_classifier.py"
    if not path.is_file():
        raise UserError(f"no classifier at {path}: it is {what_is(path)}; {remedy}")
    facts = read_classifier_facts(path)
    if facts is None:
        raise UserError(f"{path} was not made by scripts/train_classifier.py: {remedy}")
    state = read_state(path)
    known = timm.get_pretrained_cfg(facts.network) if timm.is_model(facts.network) else None
    bias = state.get(f"{known.classifier}.bias") if known else None
    if bias is None:
        raise UserError(f"{path} holds no classifier made by timm's {facts.network}: {remedy}")
    net = timm.create_model(facts.network, num_classes=len(bias))
    load_strictly(net, state, path, f"timm's {facts.network}")
    return Classifier(net, facts.size), asdict(facts)
