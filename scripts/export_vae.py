"""Write the VAE of a checkpoint as a diffusers folder that needs nothing of this repository.

    python scripts/export_vae.py exps/NAME/checkpoints/0400000 my-vae --data packed --path DIR \
        --evaluation vae.json

OUT holds config.json with per-channel latents_mean and latents_std (scaling_factor 1, shift_factor
0), the weights, the discriminator if there is one, and a model card. The latent norm's statistics
lag behind the last VAE weights; `--data` measures them anew, of these very weights.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from string import Template

import torch
from huggingface_hub import HfApi
from omegaconf import OmegaConf
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.errors import UserError
from models.vae import VAE, VAES, load_vae
from utils import cli
from utils.checkpoint import STATE, find_fault, versions
from utils.latent_stats import measure_latents
from utils.report import scalars

DISCRIMINATOR = "discriminator.safetensors"
FACTS = {  # of the run's config.yaml; no paths: a card is for the public
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

# $name

$what. The licence of the starting VAE applies.

## Use

```python
vae = $cls.from_pretrained("$name")  # from diffusers import $cls
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


def main() -> None:
    args = parse_args()
    check_out(args.out)
    vae, state = open_checkpoint(args.checkpoint)
    record = read_evaluation(args.evaluation) if args.evaluation else None
    mean, std, origin = statistics(args, vae)
    name = args.push_to_hub or args.out.resolve().name
    card = make_card(name, args.checkpoint, vae, state, (mean, std, origin), record)
    write(args, vae, mean, std, card)
    print(f"{args.out}: {type(vae.net).__name__}, statistics: {origin}")
    if args.push_to_hub:
        push(args.out, args.push_to_hub)


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", type=Path, help="exps/NAME/checkpoints/0400000, or a diffusers folder")
    add("out", type=Path, metavar="OUT", help="folder to write; must not exist, or be empty")
    cli.add_source_arguments(parser, required=False)  # if given: measure the statistics there
    add("--num", type=cli.positive, default=4096, help="images to measure on")
    add("--seed", type=int, default=0, help="chooses the images")
    add("--evaluation", type=Path, help="record of `evaluate_fid.py --vae` for the card")
    add("--push-to-hub", metavar="ID", help="also upload OUT to this hub repository")
    return parser.parse_args()


def check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: choose another OUT, or delete it")


def open_checkpoint(folder: Path) -> tuple[VAE, dict]:
    """The VAE and state.json ({} for a mere diffusers folder)."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one like exps/NAME/checkpoints/0400000")
    state = {}
    if (folder / STATE).exists():
        fault = find_fault(folder)
        if fault:
            raise UserError(f"{folder} is not a whole checkpoint: {fault}; choose another")
        state = json.loads((folder / STATE).read_text())
    return load_vae(str(folder)).eval().requires_grad_(False), state


# --------------------------------------------------------------------------------------
# Statistics.


def statistics(args: argparse.Namespace, vae: VAE) -> tuple[Tensor, Tensor, str]:
    """Per-channel mean and std (C,) of the latents, and where they come from, in words."""
    if args.data is None:
        known = vae.latent_stats()
        if known is None:
            raise UserError(f"{args.checkpoint} holds no latent statistics: measure them by --data")
        return (
            *known,
            "Those in the checkpoint's VAE config (of a run: its latent norm's, with eps)",
        )
    source = cli.open_source_of(args)
    num = min(args.num, len(source))
    vae.to("cuda" if torch.cuda.is_available() else "cpu")
    mean, std = (v.cpu() for v in measure_latents(vae, source, num, args.seed))
    vae.cpu()
    what = f"{args.data} ({args.split} split)" if args.data == "digits" else args.data
    return mean, std, (
        f"Measured in float64, posterior samples in expectation, on {num} images of {what} at "
        f"{args.resolution} px, seed {args.seed}"
    )  # fmt: skip


# --------------------------------------------------------------------------------------
# The card.


def make_card(
    name: str,
    checkpoint: Path,
    vae: VAE,
    state: dict,
    stats: tuple[Tensor, Tensor, str],
    record: dict | None,
) -> str:
    """README.md, with the front matter that the hub reads."""
    mean, std, origin = stats
    facts = run_facts(checkpoint)
    base = VAES[facts["vae.name"]].hub if facts.get("vae.name") in VAES else None
    imported = " (imported from published weights)" if state.get("imported") else ""
    step = f", step {state['step']}" if "step" in state else ""
    shape = "(N, 3, 1, H, W): one frame" if vae.has_frames else "(N, 3, H, W)"
    rows = enumerate(zip(mean.tolist(), std.tolist()))
    return CARD.substitute(
        name=name,
        base=f"base_model: {base}\n" if base else "",
        what=f"VAE exported from a checkpoint of REPA-E{step}{imported}",
        cls=type(vae.net).__name__,
        view="1, -1, 1, 1, 1" if vae.has_frames else "1, -1, 1, 1",
        input=f"{shape}, sides a multiple of {vae.downsample_factor}",
        scalars="" if vae.has_frames else " (1 and 0 here)",
        training=training_table(state, facts),
        origin=origin,
        stats="\n".join(f"| {i} | {m:.6f} | {s:.6f} |" for i, (m, s) in rows),
        evaluation=evaluation_table(record),
        versions=", ".join(f"{k} {v}" for k, v in versions().items() if v),
    )


def run_facts(checkpoint: Path) -> dict:
    """Chosen values of config.yaml of the run that `checkpoint` lies in; {} without one."""
    path = checkpoint.resolve().parent.parent / "config.yaml"
    if not path.is_file():
        return {}
    config = OmegaConf.load(path)
    found = {name: OmegaConf.select(config, name) for name in FACTS}
    return {
        name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        for name, value in found.items()
        if value is not None
    }


def training_table(state: dict, facts: dict) -> str:
    rows = {"step": state["step"]} if "step" in state else {}
    rows |= {FACTS[name]: value for name, value in facts.items()}
    source = state.get("source")
    if source:
        rows |= {"published file": source["file"], "its sha256": source["sha256"]}
    rows |= {f"{k} of the run": v for k, v in state.get("versions", {}).items() if v}
    if not rows:
        return "Not recorded: exported from a folder without state.json and config.yaml."
    lines = [f"| {name} | {in_words(value)} |" for name, value in rows.items()]
    return "\n".join(["| what | value |", "|---|---|", *lines])


def in_words(value) -> str:
    """A config value for a table; weight files are left out, they are somebody's paths."""
    if isinstance(value, dict):
        shown = {k: v for k, v in value.items() if "weights" not in k}
        return ", ".join(f"{k} {in_words(v)}" for k, v in shown.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def read_evaluation(path: Path) -> dict:
    """A record of `evaluate_fid.py --vae`."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        usable = "vae" in record and bool(scalars(record))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        usable = False
    if not usable:
        raise UserError(f"--evaluation {path}: expected the --out of `evaluate_fid.py --vae`")
    return record


def evaluation_table(record: dict | None) -> str:
    """Metrics with their number of images in the name, and why they compare with nothing, if so."""
    if record is None:
        return "Not evaluated."
    lines = [f"| {name} | {value:.4f} |" for name, value in scalars(record).items()]
    features = (record.get("features") or {}).get("label", "none")
    notes = f"{record['n']} images of {record['samples']['name']}; feature network: {features}; "
    notes += f"evaluated as `{record['vae']['spec']}`."
    for why in record.get("not_comparable_because", []):
        notes += f"\nNot comparable with published numbers: {why}."
    return "\n".join(["| metric | value |", "|---|---|", *lines, "", notes])


# --------------------------------------------------------------------------------------
# The folder.


def write(args: argparse.Namespace, vae: VAE, mean: Tensor, std: Tensor, card: str) -> None:
    """Fill a draft beside OUT, then rename it."""
    out = args.out.resolve()
    draft = out.parent / f".tmp-{out.name}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        vae.save(draft, mean, std)
        disc = args.checkpoint / DISCRIMINATOR
        if disc.is_file():
            shutil.copyfile(disc, draft / DISCRIMINATOR)
        (draft / "README.md").write_text(card, encoding="utf-8")
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def push(out: Path, repo: str) -> None:
    """Upload the folder to the hub; `UserError` if that fails, the folder stays."""
    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(folder_path=out, repo_id=repo)
    except Exception as error:  # which HTTP library, hence which error, depends on the hub client
        why = (str(error).splitlines() or [""])[0][:160]
        raise UserError(
            f"{out} is written, but not uploaded to {repo} ({type(error).__name__}: {why}): where "
            f"there is a network and a login, run `hf upload {repo} {out}`"
        ) from None
    print(f"uploaded to https://huggingface.co/{repo}")


if __name__ == "__main__":
    cli.run(main)
