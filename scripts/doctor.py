"""Check a run before it starts: data, weights, shapes, batch, disk, memory, environment.

    python scripts/doctor.py --config configs/imagenet256/repae-sdvae-xl2.yaml --processes 8

One line a check: ok, warn, or FAIL with what to change. Takes seconds; loads no weights, downloads
nothing, writes nothing. Exit code 2 if something failed.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.errors import UserError
from models.vae import VAES, wanted_vae
from train_repae import train_step
from utils import checks, cli, distributed, environment
from utils.build import count
from utils.checks import Case, Finding, fail, in_words, ok, warn
from utils.config import Config, load_config
from utils.data import Source
from utils.examples import join_cache, open_training_data
from utils.memory import GIB, RESERVE, Estimate, estimate, skeleton
from utils.sources import FolderSource

SAMPLED = 8  # images that are read


def main() -> int:
    args = parse_args()
    config = load_config(args.config, args.overrides)
    ranks = args.processes or max(distributed.launched_ranks(), torch.cuda.device_count(), 1)
    memory = int(args.gpu_memory * GIB) if args.gpu_memory else environment.gpu_memory()
    published = any("imagenet" in str(file) for file in args.config)
    found = Counter(map(report, examine(Case(config, ranks, memory, published))))
    print(f"{found['FAIL']} failed, {found['warn']} to think about, {found['ok']} ok")
    return 2 if found["FAIL"] else 0


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0], epilog="key=value overrides may follow")
    add = parser.add_argument
    add("--config", action="append", default=[], metavar="FILE", help="as for train_repae.py")
    add("--processes", type=cli.positive, metavar="N", help="ranks; default: the visible GPUs")
    add("--gpu-memory", type=float, metavar="GIB", help="of one GPU; default: what is free here")
    args, args.overrides = parser.parse_known_args()
    return args


def examine(case: Case) -> Iterator[Finding]:
    """The findings of all checks, whatever each of them finds."""
    for name, check in CHECKS.items():
        try:
            for finding in check(case):
                yield finding._replace(name=finding.name or name)
        except UserError as error:
            yield fail(str(error), name)


def report(finding: Finding) -> str:
    """Print one line; returns its status."""
    text = " ".join(finding.text.split())
    print(f"{finding.status:<4}  {finding.name:<8}  {text}", flush=True)
    return finding.status


def check_data(case: Case) -> Iterator[Finding]:
    """The source opens, with the expected classes and enough images."""
    c = case.config
    try:
        case.source = open_training_data(c)
    except UserError as error:
        yield fail(f"{error}{how_to_pack(c)}")
        return
    num, classes = len(case.source), case.source.num_classes
    text = f"{num:,} images of {classes:,} classes, {c.data.source} {c.data.path or c.data.split}"
    if classes == 1:
        text = text.replace("1 classes", "one class")
        text += "; guidance (cfg_scale) has no classes to tell apart and does next to nothing"
    yield ok(text)
    if num < c.run.batch_size:
        yield fail(f"{num:,} images are fewer than run.batch_size={c.run.batch_size}: lower it")


def check_latents(case: Case) -> Iterator[Finding]:
    """Cached latents belong to these images and hold what the config asks for."""
    folder = case.config.data.latents
    if folder is None or case.source is None:
        return
    cache = join_cache(case.config, case.source).cache
    yield ok(f"{folder}, of {cache.meta['vae']}; its weights are compared at the start")


def how_to_pack(c: Config) -> str:
    """The command that makes a packed data set that is not there."""
    d = c.data
    if d.source != "packed" or not d.path or Path(d.path).expanduser().is_dir():
        return ""
    command = f"python scripts/prepare_data.py IMAGES {d.path} --resolution {d.resolution}"
    return f", or make it: {command}"


def check_images(case: Case) -> Iterator[Finding]:
    """A few images, spread over the set, can be read and are not smaller than asked for."""
    if case.source is None:
        return
    last, faults = len(case.source) - 1, []
    chosen = sorted({last * i // (SAMPLED - 1) for i in range(SAMPLED)})
    for i in chosen:
        try:
            case.source[i]
        except UserError as error:
            faults.append(str(error))
    if faults:
        yield fail(f"{len(faults)} of {len(chosen)} sampled fail; the first: {faults[0]}")
    else:
        yield about_sides(short_sides(case.source, chosen), case.source.resolution, len(chosen))


def about_sides(sides: list[int], wanted: int, num: int) -> Finding:
    small = [side for side in sides if side < wanted]
    if small:
        return warn(
            f"{len(small)} of {num} sampled are smaller than {wanted} px (down to {min(small)}), "
            "and would be enlarged: lower data.resolution, or leave them out"
        )
    return ok(f"{num} sampled can be read" + (f"; {min(sides)} px or more" if sides else ""))


def short_sides(source: Source, indices: list[int]) -> list[int]:
    """Pixels, of the files themselves; [] where the source holds images cut to size."""
    if not isinstance(source, FolderSource):
        return []
    sides = []
    for i in indices:
        with Image.open(source.root / source.key(i)) as image:
            sides.append(min(image.size))
    return sides


def check_tokens(case: Case) -> Iterator[Finding]:
    """Latents, patches and encoder features meet."""
    c = case.config
    wanted = None if c.vae.name in VAES else wanted_vae(c.vae.name)
    if wanted and wanted.path is None:
        yield warn(f"unknown: config.json of {c.vae.name} is not here, and not downloaded for this")
        return
    known = case.source.num_classes if case.source else c.data.num_classes
    case.nets = skeleton(c, known or 1000)
    grid, latent = case.nets.sit.grid, case.nets.vae.latent_shape(c.data.resolution)
    named = {"SiT": case.nets.sit, "VAE": case.nets.vae, "discriminator": case.nets.disc}
    sizes = ", ".join(f"{k} {count(net) / 1e6:,.1f} M" for k, net in named.items() if net)
    aligned = f", aligned with {', '.join(c.encoder.names)}" if c.uses_encoder else ""
    latents = "x".join(map(str, latent))
    yield ok(f"{grid}x{grid} of {latents} latents{aligned}; parameters: {sizes}")


def check_memory(case: Case) -> Iterator[Finding]:
    """GPU memory of one rank, and what would make it enough. Comes last: it uses up the nets."""
    if case.nets is None or case.rank_batch is None:
        return
    have, k, batch = case.gpu_memory, case.config.run.accumulation, case.rank_batch
    found = estimate(case.config, case.nets, train_step)
    need = found.peak(batch, k) + RESERVE
    text = f"about {in_words(need)} a GPU: {shares(found, batch, k)}"
    if have is None:
        yield ok(text + ways(found, batch, k))
    elif need > have:
        yield fail(f"{text}; {in_words(have)} are free: {remedy(case, found)}")
    elif need > 0.9 * have:
        yield warn(f"{text}; {in_words(have)} are free, which is tight{ways(found, batch, k)}")
    else:
        yield ok(f"{text}; {in_words(have)} are free")


def shares(found: Estimate, batch: int, k: int) -> str:
    """What the memory is for."""
    resident = sum(found.resident.values())
    work = found.peak(batch, k) - resident
    return (
        f"{in_words(resident)} weights, EMA, gradients and Adam, {in_words(work)} for "
        f"{batch // k} images at a time, {in_words(RESERVE)} set aside"
    )


def ways(found: Estimate, batch: int, k: int) -> str:
    """What more micro-batches would save, if it is worth it."""
    sizes = {n: found.peak(batch, n) + RESERVE for n in (k, 2 * k, 4 * k) if batch % n == 0}
    worth = [n for n in sizes if sizes[n] < 0.9 * sizes[k]]
    return "".join(f"; with run.accumulation={n} {in_words(sizes[n])}" for n in worth)


def remedy(case: Case, found: Estimate) -> str:
    """Settings with which a step fits, tried out on the estimate."""
    c, batch = case.config, case.rank_batch
    if k := found.accumulation_that_fits(batch, case.gpu_memory):
        return f"set run.accumulation={k} ({in_words(found.peak(batch, k) + RESERVE)})"
    thrifty = replace(c, run=replace(c.run, gradient_checkpointing=True))
    less = estimate(thrifty, skeleton(thrifty, case.nets.sit.config.num_classes), train_step)
    if k := less.accumulation_that_fits(batch, case.gpu_memory):
        size = in_words(less.peak(batch, k) + RESERVE)
        return f"set run.gradient_checkpointing=true run.accumulation={k} ({size})"
    least = in_words(less.peak(batch, batch) + RESERVE)
    return f"even one image at a time with checkpointing needs {least}: take a smaller sit.size"


CHECKS = {
    "packages": checks.check_packages,
    "data": check_data,
    "latents": check_latents,
    "images": check_images,
    "batch": checks.check_batch,
    "tokens": check_tokens,
    "device": checks.check_device,
    "workers": checks.check_workers,
    "resume": checks.check_resume,
    "weights": checks.check_weights,
    "disk": checks.check_disk,
    "memory": check_memory,
}

if __name__ == "__main__":
    cli.run(main)
