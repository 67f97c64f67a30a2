"""The README.md of an exported VAE, with the front matter that the Hugging Face hub reads."""

from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from string import Template
from typing import Any

from models.errors import UserError, read_json
from models.vae import VAE
from models.vae_families import VAES
from utils.config.load import CONFIG_FILE, read_saved_config
from utils.evaluation.report import scalars
from utils.provenance import versions
from utils.records import number, parse_record

# Settings of the run that a card shows, and their names in it. No paths: a card is for the public.
SHOWN_SETTINGS = {
    "vae.name": "starting VAE",
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
CARD = Template("""\
---
library_name: diffusers
license: other
license_name: as-starting-vae
${base}tags:
- vae
- autoencoder
- repa-e
---

# $title

$what. The licence of the starting VAE applies.

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
    row = VAES.get(settings.get("vae.name", ""))
    both = " and ".join(f"{value:g}" for value in vae.family.saved_with_stats.values())
    step = f", step {state['step']}" if "step" in state else ""
    imported = " (imported from published weights)" if state.get("imported") else ""
    channels = enumerate(zip(mean.tolist(), std.tolist()))
    return CARD.substitute(
        title=title,
        base=f"base_model: {row.repo}\n" if row and row.repo else "",
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


def read_run_settings(checkpoint: Path, state: dict) -> dict:
    """`SHOWN_SETTINGS` of the run that wrote `checkpoint`, by name; {} if no run of ours did."""
    path = checkpoint.resolve().parent.parent / CONFIG_FILE
    if not state or state.get("imported") or not path.is_file():
        return {}
    try:
        saved = asdict(read_saved_config(path))
    except UserError as error:  # no reason to keep the weights back
        print(f"{path} is left out of the model card: {error}", flush=True)
        return {}
    return {name: reduce(getitem, name.split("."), saved) for name in SHOWN_SETTINGS}


def training_table(state: dict, settings: dict) -> str:
    rows = {"step": state["step"]} if "step" in state else {}
    rows |= {SHOWN_SETTINGS[name]: value for name, value in settings.items() if value is not None}
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
    """A setting for a table cell; weight files are left out, as they are somebody's paths."""
    if isinstance(value, dict):
        shown = {k: v for k, v in value.items() if "weights" not in k}
        return ", ".join(f"{k} {format_setting(v)}" for k, v in shown.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


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
    features = (record.get("features") or {}).get("label", "none")
    notes = f"{record['n']} images of {record['samples']['name']}; feature network: {features}; "
    notes += f"evaluated as `{record['vae']['spec']}`."
    for why in record.get("not_comparable_because", []):
        notes += f"\nNot comparable with published numbers: {why}."
    return f"{table('metric', {k: f'{v:.4f}' for k, v in scalars(record).items()})}\n\n{notes}"
