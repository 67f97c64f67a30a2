"""The README.md of an exported pipeline, with the front matter that the Hugging Face hub reads."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from models.autoencoders.families import FAMILIES
from models.checks.errors import UserError
from models.checks.file_kinds import read_json
from utils.evaluation.options import sampling_settings
from utils.evaluation.report import fixed
from utils.pipeline.pipeline import RepaePipeline
from utils.provenance import versions
from utils.published.model_card import licence_of, public, table, training_table
from utils.records import number, parse_record
from utils.sampling.labels import short_name

CARD = Template("""\
---
library_name: diffusers
$front
tags:
- repa-e
- sit
- class-conditional
---

# $title

$what. $licence

## Use

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("$title", custom_pipeline="$title", trust_remote_code=True)
images = pipe([$example], guidance_scale=$scale, num_inference_steps=50).images
```

Of a folder on disk, the name is its path; `pipe.to("cuda")` moves it to a GPU. It needs torch,
diffusers and accelerate, and nothing else: `trust_remote_code=True` runs the two files of code
beside the weights, `pipeline.py` and `sit_ema/sit.py`; read them first. One image is made for each
class given, `generator=torch.Generator().manual_seed(0)` makes those of seed 0, and
`help(pipe.__call__)` lists all arguments.

## Networks

$facts

## Training

$training

## Numbers

$evaluation

## Made with

$versions
""")
# settings of sampling that a number depends on, and their names in the card
SAMPLED = {
    "solver": "solver",
    "steps": "steps",
    "cfg_scale": "guidance scale",
    "guidance_low": "guided from t =",
    "guidance_high": "to t =",
    "cfg_channels": "guided channels",
    "heun_guidance": "guidance of Heun's corrector",
    "timestep_shift": "timestep shift",
    "precision": "precision",
    "uint8": "rule of rounding",
    "seed": "seed",
}


def make_card(
    title: str, pipe: RepaePipeline, state: dict, settings: dict, record: dict | None
) -> str:
    """The whole card. state: a checkpoint's state.json or {}; settings: what `read_run_settings`
    of utils/published/model_card.py gave; record: what `read_evaluation` gave."""
    step = f", step {state['step']}" if "step" in state else ""
    imported = " (imported from published weights)" if state.get("imported") else ""
    names = pipe.config.id2label or {}
    first = short_name(names.get("0", ""), 0)
    return CARD.substitute(
        licence_of(state, settings),
        title=title,
        what=f"Class-conditional images, from a checkpoint of REPA-E{step}{imported}: "
        "a latent diffusion transformer (SiT) and its VAE",
        example="0" if first == "class 0" else f'"{plain(first)}"',
        scale="4.0" if pipe.sit_ema.config.class_dropout_prob else "1.0",
        facts=table("what", facts_of(pipe, names)),
        training=training_table(state, settings),
        evaluation=evaluation_section(record),
        versions=", ".join(f"{k} {v}" for k, v in versions().items() if v),
    )


def facts_of(pipe: RepaePipeline, names: dict[str, str]) -> dict[str, str]:
    """What the networks are."""
    sit, vae = pipe.sit_ema, pipe.vae
    c, count = sit.config, lambda net: f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M"
    size = f"depth {c.depth}, width {c.hidden_size}, patch {c.patch_size}"
    side, factor = c.input_size, FAMILIES[type(vae).__name__].downsample_factor(vae.config)
    first = [short_name(name, int(label)) for label, name in list(names.items())[:3]]
    some = ", ".join(map(plain, first))
    more = ", ..." if len(names) > 3 else ""
    return {
        "classes": f"{c.num_classes}" + (f": {some}{more}" if names else ""),
        "SiT": f"{size}, {count(sit)} parameters, {pipe.config.path} interpolant",
        "VAE": f"{type(vae).__name__}, {count(vae)} parameters",
        "latents": f"{c.in_channels} x {side} x {side}",
        "images": f"{side * factor} x {side * factor} pixels",
    }


# --------------------------------------------------------------------------------------
# Numbers.


@dataclass
class _Images:
    name: str
    record: dict[str, Any] | None = None
    label_sampling: str | None = None


@dataclass
class _Reference:
    name: str


@dataclass
class _Features:
    label: str


@dataclass
class _Evaluation:
    """What is read here of a record of `evaluate_fid.py --samples`."""

    samples: _Images
    metrics: dict[str, float | list[float]]
    # images
    n: int = number(at_least=1)
    reference: _Reference | None = None
    features: _Features | None = None
    not_comparable_because: list[str] = field(default_factory=list)


def read_evaluation(path: Path, weights: dict[str, str]) -> dict:
    """A record that `evaluate_fid.py --samples` has written of samples from these `weights` (sha256
    by file name); else `UserError`."""
    remedy = "expected the --out of `evaluate_fid.py --samples`"
    content = read_json(path, f"--evaluation {path}: {remedy}")
    try:
        record = asdict(parse_record(content, _Evaluation))
    except UserError as error:
        raise UserError(f"--evaluation {path}: {error}; {remedy}") from None
    if not record["metrics"]:
        raise UserError(f"--evaluation {path} holds no metrics: {remedy}")
    of = sampling_settings(record["samples"]["record"]).get("weights")
    if not isinstance(of, dict):
        text = "its samples have no record of sample_ddp.py"
        raise UserError(f"--evaluation {path}: {text}, so nobody knows whose numbers these are")
    both = [name for name in weights if name.endswith(".safetensors")]
    if wrong := [name for name in both if of.get(name) != weights[name]]:
        text = f"its samples were made with another {wrong[0]}"
        raise UserError(f"--evaluation {path}: {text} than this checkpoint's; name its own record")
    return record


def evaluation_section(record: dict | None) -> str:
    """Metrics with their protocol, and why they are not comparable with published ones, if so."""
    if record is None:
        return "Not evaluated."
    numbers = {plain(k): fixed(v) for k, v in record["metrics"].items() if isinstance(v, float)}
    sampled = sampling_settings(record["samples"]["record"])
    protocol = {"images": str(record["n"]), "labels": record["samples"]["label_sampling"] or "?"}
    protocol |= {shown: str(sampled[name]) for name, shown in SAMPLED.items() if name in sampled}
    for name, what in (("reference", "name"), ("features", "label")):
        protocol |= {name: plain(record[name][what])} if record[name] else {}
    text = f"{table('metric', numbers)}\n\nProtocol:\n\n{table('what', protocol)}"
    for why in record["not_comparable_because"]:
        text += f"\n\nNot comparable with published numbers: {plain(why)}."
    return text


def plain(text: str) -> str:
    """Without the folders of somebody, and without what would end a table's cell or a text."""
    return public(text).replace("|", "/").replace("\n", " ").replace('"', "'")
