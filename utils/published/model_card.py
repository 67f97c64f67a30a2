"""The README.md of an exported VAE, with the front matter that the Hugging Face hub reads."""

import re
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from string import Template
from typing import Any

from models.autoencoders.names import published_vae
from models.checks.errors import UserError
from models.checks.file_kinds import read_json
from models.vae import VAE
from utils.config.load import CONFIG_FILE, read_saved_config
from utils.evaluation.report import fixed, scalars
from utils.provenance import versions
from utils.records import number, parse_record

# Settings of the run that a card shows, and their names in it. No paths: a card is for the public.
SHOWN_SETTINGS = {
    "vae.name": "VAE",
    "data.source": "data source",
    "data.resolution": "resolution, px",
    "run.batch_size": "global batch",
    "run.precision": "precision",
    "vae.optim.lr": "learning rate of the VAE",
    "sit.size": "SiT trained with it",
    "encoder.names": "aligned encoders",
    "loss.reg": "reconstruction loss",
    "loss.align": "alignment loss",
}
# further ones, which are not shown: what the VAE goes back to
ORIGIN = ("vae.weights", "run.init_from")
CARD = Template("""\
---
library_name: diffusers
$front
tags:
- vae
- autoencoder
- repa-e
---

# $title

$what. $licence

## Use

```python
vae = $cls.from_pretrained("$title")  # from diffusers import $cls
mean, std = (torch.tensor(vae.config[k]).view($view) for k in ("latents_mean", "latents_std"))
z = (vae.encode(x).latent_dist.sample() - mean) / std; x_hat = vae.decode(z * std + mean).sample
```

`x` is in [-1, 1], $input.

**Warning.** The pipelines of Stable Diffusion, SD3 and FLUX ignore `latents_mean` and
`latents_std`: they know `scaling_factor` and `shift_factor` only$scalars, so their latents stay
un-normalised. Normalise as above.

## Training

$training

## Latent statistics

$origin.

| channel | mean | std |
|---|---|---|
$stats

## Reconstruction

$evaluation

## Made with

$versions
""")


def make_card(
    title: str, vae: VAE, stats: tuple, state: dict, settings: dict, record: dict | None
) -> str:
    """The whole card. stats: mean and std, (C,) each, and where they come from, as a sentence;
    state: a checkpoint's state.json or {}; then what `read_run_settings`, `read_evaluation` gave.
    """
    mean, std, origin = stats
    both = " and ".join(f"{value:g}" for value in vae.family.saved_with_stats.values())
    step = f", step {state['step']}" if "step" in state else ""
    imported = " (imported from published weights)" if state.get("imported") else ""
    channels = enumerate(zip(mean.tolist(), std.tolist()))
    return CARD.substitute(
        licence_of(state, settings),
        title=title,
        what=f"VAE exported from a checkpoint of REPA-E{step}{imported}",
        cls=type(vae.net).__name__,
        view=", ".join(map(str, vae.family.stats_shape)),
        input=f"{vae.family.input_shape}, sides a multiple of {vae.downsample_factor}",
        scalars=f" ({both} here)" if both else "",
        training=training_table(state, settings),
        origin=origin,
        stats="\n".join(f"| {i} | {m:.6f} | {s:.6f} |" for i, (m, s) in channels),
        evaluation=evaluation_table(record),
        versions=", ".join(f"{k} {v}" for k, v in versions().items() if v),
    )


def licence_of(state: dict, settings: dict) -> dict[str, str]:
    """What `front` matter and `licence`, a sentence, say of where the VAE comes from; arguments as
    in `make_card`."""
    known = (state.get("config") or {}) | settings
    row = published_vae(known.get("vae.name"))
    weights, other = known.get("vae.weights"), known.get("run.init_from")
    if row is None or other or state.get("imported"):
        text = "What its weights go back to is not recorded here: the licence of that applies."
        return {"front": "license: other\nlicense_name: as-its-origin", "licence": text}
    if row.repo and weights is not None:
        front = f"license: other\nlicense_name: as-starting-vae\nbase_model: {row.repo}"
        return {"front": front, "licence": "The licence of the starting VAE applies."}
    text = "Trained from random weights, by code under the MIT licence; change the licence above"
    return {"front": "license: mit", "licence": f"{text} if the training data ask for another."}


def read_run_settings(checkpoint: Path, state: dict) -> dict:
    """`SHOWN_SETTINGS` and `ORIGIN` of the run that wrote `checkpoint`, by name; {} if no run of
    ours did."""
    path = checkpoint.resolve().parent.parent / CONFIG_FILE
    if not state or state.get("imported") or not path.is_file():
        return {}
    try:
        saved = asdict(read_saved_config(path))
    except UserError as error:  # no reason to keep the weights back
        print(f"{path} is left out of the model card: {error}", flush=True)
        return {}
    return {name: reduce(getitem, name.split("."), saved) for name in (*SHOWN_SETTINGS, *ORIGIN)}


def training_table(state: dict, settings: dict) -> str:
    rows = {"step": state["step"]} if "step" in state else {}
    shown = {SHOWN_SETTINGS[name]: v for name, v in settings.items() if name in SHOWN_SETTINGS}
    rows |= {name: value for name, value in shown.items() if value is not None}
    if source := state.get("source"):
        rows |= {"published file": source.get("file"), "its sha256": source.get("sha256")}
    when = "import" if state.get("imported") else "run"
    rows |= {f"{k} of the {when}": v for k, v in state.get("versions", {}).items() if v}
    if not rows:
        return "Not recorded: exported from a folder without state.json and config.yaml."
    return table("what", {name: format_setting(value) for name, value in rows.items()})


def table(head: str, rows: dict[str, str]) -> str:
    lines = (f"| {name} | {value} |" for name, value in rows.items())
    return "\n".join([f"| {head} | value |", "|---|---|", *lines])


def format_setting(value) -> str:
    """A setting for a table cell, without weight files and folders, which are somebody's."""
    if isinstance(value, dict):
        shown = {k: v for k, v in value.items() if "weights" not in k and v is not None}
        return ", ".join(f"{k} {format_setting(v)}" for k, v in shown.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else public(value)


def public(value) -> str:
    """A text without the folders in it: of each path, its last name."""
    parts = re.split(r"([\s,;:@=\[\]`]+)", str(value))
    return "".join(Path(part).name if is_path(part) else part for part in parts)


def is_path(text: str) -> bool:
    """Whether a word is a path of this machine, and not a hub id or "SiT-XL/2"."""
    return "/" in text and (text.startswith(("/", "~", ".", "$")) or text.count("/") > 1)


@dataclass
class _Images:
    name: str


@dataclass
class _Features:
    label: str


@dataclass
class _Vae:
    spec: str


@dataclass
class _Evaluation:
    """What is read here of a record of `evaluate_fid.py --vae`."""

    samples: _Images
    vae: _Vae
    metrics: dict[str, float | list[float]]
    details: dict[str, dict[str, Any]]
    # images
    n: int = number(at_least=1)
    features: _Features | None = None
    not_comparable_because: list[str] = field(default_factory=list)


def read_evaluation(path: Path) -> dict:
    """A record that `evaluate_fid.py --vae` has written; `UserError` if the file holds none."""
    remedy = "expected the --out of `evaluate_fid.py --vae`"
    content = read_json(path, f"--evaluation {path}: {remedy}")
    try:
        record = asdict(parse_record(content, _Evaluation))
        parse_record(scalars(record), dict[str, float])  # also the ratios to the floors
    except UserError as error:
        raise UserError(f"--evaluation {path}: {error}; {remedy}") from None
    if not record["metrics"]:
        raise UserError(f"--evaluation {path} holds no metrics: {remedy}")
    return record


def evaluation_table(record: dict | None) -> str:
    """Metrics, and why they are not comparable with published ones, if so."""
    if record is None:
        return "Not evaluated."
    features = public((record.get("features") or {}).get("label", "none"))
    images, spec = public(record["samples"]["name"]), public(record["vae"]["spec"])
    notes = f"{record['n']} images of {images}; feature network: {features}; "
    notes += f"evaluated as `{spec}`."
    for why in record.get("not_comparable_because", []):
        notes += f"\nNot comparable with published numbers: {public(why)}."
    numbers = {public(k): fixed(v) for k, v in scalars(record).items()}
    return f"{table('metric', numbers)}\n\n{notes}"
