"""Sample images from a checkpoint, on all ranks, into the .npz that FID suites read.

    accelerate launch sample_ddp.py --checkpoint exps/NAME/checkpoints/0400000 --out NAME.npz

Image i depends on (seed, i) alone: the same pixels for any number of ranks. Batches are kept as
they finish, and the same command goes on where a killed one stopped. Beside NAME.npz (`arr_0`,
uint8 NHWC) lie NAME.json with every setting, NAME.labels.npy and NAME.png.
"""

import argparse
import json
import math
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from loss.interpolant import PATHS
from models.errors import UserError
from models.sit import SiT
from models.vae import VAE, build_vae, load_vae
from utils import cli, distributed
from utils.checkpoint import STATE, sha256_file, versions, write_atomically
from utils.generate import Sampling, draw_images, draw_labels
from utils.images import save_grid
from utils.learner import DTYPES
from utils.samplers import SOLVERS
from utils.shards import KEY, Shards, differing, hash_settings, read_record

PREVIEW_IMAGES, PREVIEW_COLUMNS = 64, 8


def main() -> None:
    state = distributed.join()
    args, settings, todo = distributed.main_first(state, plan, share=True)
    if todo is None:
        return
    shards = Shards(args.out.with_suffix(".shards"), settings)
    load = partial(load_networks, args, state.device)
    nets = distributed.main_first(state, load) if todo else None
    started = time.perf_counter()
    make_shards(args, nets, shards, todo, state)
    state.wait_for_everyone()
    if state.is_main_process:
        finish(args, shards, session_facts(shards, todo, time.perf_counter() - started, state))


# --------------------------------------------------------------------------------------
# What is asked for.


def plan() -> tuple[argparse.Namespace, dict, list[int] | None]:
    """Arguments, settings, and the batches still to be made; None if nothing is to be done."""
    args = parse_args()
    settings = resolve(args)
    if args.dry_run:
        print(json.dumps(settings, indent=1))
        return args, settings, None
    shards = Shards(args.out.with_suffix(".shards"), settings)
    if is_done(args.out, shards):
        print(f"{args.out}: has these {args.num_samples} images already; nothing to do")
        shards.remove()
        return args, settings, None
    shards.open()
    return args, settings, shards.unfinished()


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="folder with sit_ema/ and vae/")
    add("--out", type=Path, required=True, help=".npz to write")
    add("--num-samples", type=int, default=50_000)
    add_sampling_arguments(parser)
    add("--path", choices=PATHS, help="interpolant; default: that of the run")
    add("--batch-size", type=int, default=64, help="images per rank and network call")
    add("--decode-batch-size", type=int, default=16, help="images the VAE decodes at a time")
    add("--tf32", action="store_true", help="TF32 in what is float32, as the published samples")
    add("--uint8", choices=("round", "truncate"), default="round", help="truncate = as published")
    add("--compile", action="store_true", help="torch.compile the SiT")
    add("--dry-run", action="store_true", help="print the settings and exit")
    args = parser.parse_args()
    check(args)
    return args


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """What the pixels depend on beside the weights, as published."""
    add = parser.add_argument
    add("--solver", choices=SOLVERS, default="sde")
    add("--steps", type=int, default=250)
    add("--cfg-scale", type=float, default=1.0, help="1 = no guidance")
    add("--guidance-low", type=float, default=0.0, help="guide from this t (0 = data) ...")
    add("--guidance-high", type=float, default=1.0, help="... to this t (1 = noise)")
    add("--timestep-shift", type=float, default=1.0, help="above 1: more steps near the noise")
    add("--class-balanced", action="store_true", help="labels 0, 1, 2, ... in turn, not random")
    add("--seed", type=int, default=0)
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="of the SiT; the VAE is fp32")


def check(args: argparse.Namespace) -> None:
    """Raise `UserError` for values that no run could use."""
    for name in ("num_samples", "steps", "batch_size", "decode_batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.solver == "sde" and args.steps < 2:
        raise UserError(f"--solver sde needs --steps 2 or more, not {args.steps}")
    if not 0 <= args.guidance_low <= args.guidance_high <= 1:
        raise UserError(
            f"--guidance-low {args.guidance_low} --guidance-high {args.guidance_high} must be an "
            "interval inside [0, 1]"
        )
    if not (math.isfinite(args.cfg_scale) and args.cfg_scale >= 0):
        raise UserError(f"--cfg-scale {args.cfg_scale} must be a number from 0; 1 = no guidance")
    if not (math.isfinite(args.timestep_shift) and args.timestep_shift > 0):
        raise UserError(f"--timestep-shift {args.timestep_shift} must be a positive number")
    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out} must end in .npz")


def resolve(args: argparse.Namespace) -> dict:
    """Every setting that the pixels depend on, the weights' hashes among them."""
    sit, vae = (read_config(args.checkpoint, name) for name in ("sit_ema", "vae"))
    state = read_record(args.checkpoint / STATE) or {}
    hashes = hash_weights(args.checkpoint, state.get("files", {}))
    args.path = args.path or state.get("path", "linear")
    check_against(args, sit)
    with torch.device("meta"):
        vae = build_vae(str(args.checkpoint / "vae"))
    if vae.latent_channels != sit["in_channels"]:
        raise UserError(
            f"--checkpoint {args.checkpoint}: sit_ema/ makes latents of {sit['in_channels']} "
            f"channels, vae/ decodes {vae.latent_channels}; put the VAE there that it was made for"
        )
    left_out = ("out", "dry_run", "checkpoint")
    chosen = {k: v for k, v in vars(args).items() if k not in left_out}
    size = {"resolution": sit["input_size"] * vae.downsample_factor}
    return chosen | size | {"num_classes": sit["num_classes"], "weights": hashes}


def read_config(checkpoint: Path, name: str) -> dict:
    config = read_record(checkpoint / name / "config.json")
    if config is None:
        raise UserError(
            f"--checkpoint {checkpoint} has no {name}/ with a config.json: name a folder with "
            "sit_ema/ and vae/, such as exps/NAME/checkpoints/0400000"
        )
    return config


def hash_weights(checkpoint: Path, sealed: dict) -> dict[str, str]:
    """sha256 of each file that is loaded; `UserError` where state.json knows another."""
    files = sorted(p for name in ("sit_ema", "vae") for p in (checkpoint / name).iterdir())
    hashes = {str(p.relative_to(checkpoint)): sha256_file(p) for p in files if p.is_file()}
    for name, digest in hashes.items():
        if sealed.get(name, digest) != digest:
            raise UserError(
                f"{checkpoint / name} is not as it was saved: copy the checkpoint again"
            )
    return hashes


def check_against(args: argparse.Namespace, config: dict) -> None:
    """Raise `UserError` for what this SiT cannot do."""
    if args.cfg_scale != 1 and not config["class_dropout_prob"]:
        raise UserError(
            f"--cfg-scale {args.cfg_scale}: this SiT was trained without a null label; leave it 1"
        )
    if args.class_balanced and args.num_samples % config["num_classes"]:
        raise UserError(
            f"--class-balanced: --num-samples {args.num_samples} does not split evenly over "
            f"{config['num_classes']} classes: give a multiple"
        )


def is_done(out: Path, shards: Shards) -> bool:
    """Whether `out` holds these very samples; `UserError` if it holds others, or nobody knows."""
    if not out.exists():
        return False
    record = read_record(out.with_suffix(".json"))
    if record is None and shards.exist():  # killed between the .npz and its record
        return False
    if record is not None and record.get(KEY) == shards.key:
        return True
    why = differing(record, shards.settings)
    raise UserError(f"--out {out} exists, of other settings ({why}): choose another, or delete it")


# --------------------------------------------------------------------------------------
# The images.


def make_shards(
    args: argparse.Namespace,
    nets: tuple[SiT, VAE] | None,
    shards: Shards,
    todo: list[int],
    state: PartialState,
) -> None:
    """Sample this rank's part of the batches in `todo`."""
    left = sum(len(shards.indices(index)) for index in todo)
    settings = sampling(args)
    show = state.is_main_process and left > 0
    done = args.num_samples - left
    bar = tqdm(total=args.num_samples, initial=done, unit="img", disable=not show)
    for index in todo[state.process_index :: state.num_processes]:
        images = draw_images(settings, *nets, shards.indices(index), state.device)
        shards.write(index, np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()))
        bar.update(min(len(images) * state.num_processes, bar.total - bar.n))
    bar.close()


def sampling(args: argparse.Namespace) -> Sampling:
    """The flags that the pixels depend on."""
    return Sampling(**{f.name: getattr(args, f.name) for f in fields(Sampling)})


def load_networks(args: argparse.Namespace, device: torch.device) -> tuple[SiT, VAE]:
    """EMA SiT in the sampling precision, without its projectors, and the VAE in float32."""
    distributed.allow_tf32(args.tf32)
    sit = load_sit(args.checkpoint / "sit_ema")
    sit.projectors = torch.nn.ModuleList()
    if args.precision != "fp32":
        for module in sit.modules():  # the big weights once, not at every call; norms stay float32
            if isinstance(module, torch.nn.Linear):
                module.to(DTYPES[args.precision])
    sit = sit.to(device).eval().requires_grad_(False)
    if args.compile:
        sit.compile(dynamic=False)  # few batch sizes: one, twice that under guidance, the last
    return sit, load_vae(str(args.checkpoint / "vae")).to(device).eval().requires_grad_(False)


def load_sit(folder: Path) -> SiT:
    """`SiT.from_pretrained`, but a missing or misshapen tensor is an error, not a random number."""
    try:
        sit, report = SiT.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {folder} ({error}): copy the checkpoint again") from None
    wrong = [f"{kind.replace('_', ' ')} {names}" for kind, names in report.items() if names]
    if wrong:
        raise UserError(f"{folder} does not fit its config.json: {'; '.join(wrong)}")
    return sit


# --------------------------------------------------------------------------------------
# What is left behind.


def session_facts(shards: Shards, todo: list[int], seconds: float, state: PartialState) -> dict:
    """Of this session alone: what an earlier, killed one made is not counted."""
    made = sum(len(shards.indices(index)) for index in todo)
    on_gpu = state.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(state.device) if on_gpu else "cpu",
        "ranks": state.num_processes,
        "images_sampled": made,
        "seconds": seconds,
        "images_per_second": made / seconds if made else None,
    }


def finish(args: argparse.Namespace, shards: Shards, facts: dict) -> None:
    """Join the batches into the .npz and write what goes beside it, the record last; then drop the
    batches."""
    record = args.out.with_suffix(".json")
    record.unlink(missing_ok=True)  # of an .npz that was deleted
    shards.write_npz(args.out)
    y = draw_labels(sampling(args), range(args.num_samples), shards.settings["num_classes"])
    np.save(args.out.with_suffix(".labels.npy"), y.numpy())
    grid = torch.from_numpy(shards.first_images(PREVIEW_IMAGES)).permute(0, 3, 1, 2)
    save_grid(args.out.with_suffix(".png"), grid, PREVIEW_COLUMNS, max(1, 64 // grid.shape[-1]))
    known = {"settings": shards.settings, KEY: shards.key, "checkpoint": str(args.checkpoint)}
    known |= {
        "checkpoint_sha256": hash_settings(shards.settings["weights"]),
        "versions": versions(),
    }
    write_atomically(record, json.dumps(known | facts, indent=1) + "\n")
    shards.remove()
    print(f"{args.out}: {args.num_samples} images")


if __name__ == "__main__":
    cli.run(main)
