"""Encode a data set once, so that a SiT on a frozen VAE trains without running the VAE.

    accelerate launch scripts/cache_latents.py --vae sdvae --data packed --path DIR --out CACHE
    accelerate launch train_repae.py --config CONFIG vae.train=false data.latents=CACHE

Keeps posterior mean and std, so that every step draws its own latents; with --encoders the tokens
of frozen encoders, too (encoder.cached=true). Interrupted? Run the same command again: finished
shards are kept. The layout: utils/latents.py.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.encoders import Encoder, encoder_shape, load_encoder
from models.errors import UserError
from models.vae import VAE, build_vae, load_vae
from utils import cli
from utils.checkpoint import sync, versions, write_atomically
from utils.data import Source, make_loader
from utils.distributed import allow_tf32, join, main_first
from utils.images import CROP_VERSION, u8_to_pm1
from utils.latent_stats import ChannelMoments
from utils.latents import (
    CACHE_FORMAT,
    CHECKSUMS,
    KEYS,
    checksum,
    row_shapes,
    shard_name,
    weights_digest,
    weights_id,
)
from utils.learner import DTYPES
from utils.resumable import (
    META,
    PLAN,
    TEXT,
    check_disk,
    check_plan,
    format_size,
    list_keys,
    locked,
    write_json,
    write_lines,
)


def main() -> None:
    args = parse_args()
    state = join()
    args.quiet = not state.is_main_process
    allow_tf32(True)
    source = cli.open_source_of(args)
    layout = plan_layout(args)
    work = Work(args.out, len(source), args.shard_size, layout)
    main_first(state, lambda: announce(work), share=True)
    if args.dry_run:
        return
    nets = main_first(state, lambda: load(args, state.device))
    with ExitStack() as stack:
        plan, todo = main_first(state, lambda: begin(work, source, nets, stack), share=True)
        write_shards(work, todo[state.process_index :: state.num_processes], source, nets, args)
        state.wait_for_everyone()
        if state.is_main_process:
            print(finish(work, source, plan | {"vae": args.vae}))


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--vae", required=True, metavar="SPEC", help="as vae.name: short name, hub id, folder, .pt")
    add("--vae-weights", default="hub", metavar="FILE", help="as vae.weights")
    cli.add_source_arguments(parser)
    add("--out", type=Path, required=True, metavar="CACHE", help="folder to write")
    add("--hflip", action="store_true", help="also the mirrored images, for data.hflip=true")
    add("--encoders", nargs="+", default=[], metavar="NAME", help="cache their tokens, too")
    add("--encoder-weights", nargs="+", default=[], metavar="FILE", help="one for each; published")
    add("--encoder-grid", type=cli.positive, metavar="N", help="tokens a side; resolution / 16")
    add(
        "--precision", choices=list(DTYPES), default="fp32", help="fp32: TF32 on GPUs; kept in fp16"
    )
    add("--batch-size", type=cli.positive, default=32, help="images per rank and network call")
    add("--shard-size", type=cli.positive, default=4096, help="images; what a kill can cost a rank")
    add("--workers", type=int, default=8, help="loader processes per rank")
    add("--dry-run", action="store_true", help="check, print the disk need, stop")
    args = parser.parse_args()
    if len(args.encoder_weights) not in (0, len(args.encoders)):
        given = len(args.encoder_weights)
        raise UserError(f"--encoder-weights has {given} files for {len(args.encoders)} --encoders")
    args.encoder_weights = args.encoder_weights or [None] * len(args.encoders)
    return args


# --------------------------------------------------------------------------------------
# What to write.


def plan_layout(args: argparse.Namespace) -> dict:
    """What the shapes of all arrays follow from; needs no weights."""
    with torch.device("meta"):
        latent = build_vae(args.vae).latent_shape(args.resolution)
    encoders = []
    for name, file in zip(args.encoders, args.encoder_weights):
        grid, dim = encoder_shape(name, args.resolution, args.encoder_grid)
        encoders.append({"name": name, "shape": [grid**2, dim], "weights": weights_id(name, file)})
    layout = {"copies": 1 + args.hflip, "latent_shape": list(latent), "encoders": encoders}
    return layout | {"resolution": args.resolution, "precision": args.precision}


@dataclass
class Work:
    """The shards of one cache."""

    out: Path
    num_images: int
    shard_size: int
    layout: dict

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        names = ("copies", "latent_shape", "encoders")
        return row_shapes(*(self.layout[name] for name in names))

    @property
    def shards(self) -> range:
        return range(-(-self.num_images // self.shard_size))

    def images(self, shard: int) -> range:
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_images))

    def row_bytes(self, array: str) -> int:
        return 2 * int(np.prod(self.shapes[array]))

    def file(self, array: str, shard: int) -> Path:
        return self.out / shard_name(array, shard)

    def record(self, shard: int) -> Path:
        return self.out / f"shard-{shard:05d}.json"

    def unfinished(self) -> list[int]:
        return [shard for shard in self.shards if not self._is_finished(shard)]

    def _is_finished(self, shard: int) -> bool:
        """The record is written after the arrays, so where it is whole, they are."""
        num = len(self.images(shard))
        files = [(self.file(a, shard), num * self.row_bytes(a)) for a in self.shapes]
        whole = all(file.is_file() and file.stat().st_size >= size for file, size in files)
        return whole and self.record(shard).is_file()

    def bytes_to_write(self) -> int:
        images = sum(len(self.images(shard)) for shard in self.unfinished())
        return images * sum(map(self.row_bytes, self.shapes))


def announce(work: Work) -> None:
    """Say the size of each array, of what is missing, and the room for it, before anything else."""
    for name, shape in work.shapes.items():
        size = format_size(work.num_images * work.row_bytes(name))
        print(f"{name}: {work.num_images:,} x {' x '.join(map(str, shape))} in float16, {size}")
    check_disk(work.out, work.bytes_to_write())


def make_plan(work: Work, source: Source, nets: "Networks") -> dict:
    """What must not change between two runs that share an OUT."""
    keys = "".join(f"{key}\n" for key in list_keys(source))
    encoders = [
        entry | {"sha256": weights_digest(net)}
        for entry, net in zip(work.layout["encoders"], nets.encoders)
    ]
    return work.layout | {
        "format": CACHE_FORMAT,
        "crop_version": CROP_VERSION,
        "num_images": len(source),
        "keys_sha256": hashlib.sha256(keys.encode(*TEXT)).hexdigest(),
        "vae_sha256": weights_digest(nets.vae),
        "encoders": encoders,
        "shard_size": work.shard_size,
    }


def begin(work: Work, source: Source, nets: "Networks", stack: ExitStack) -> tuple[dict, list[int]]:
    """Take the folder; return its plan and the shards to write."""
    plan = make_plan(work, source, nets)
    work.out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(work.out))
    check_plan(work.out, plan)
    todo = work.unfinished()
    check_pixels(work, source, todo)
    if todo:
        (work.out / META).unlink(missing_ok=True)
        write_json(work.out / PLAN, plan)
    return plan, todo


def check_pixels(work: Work, source: Source, todo: list[int]) -> None:
    """`UserError` where a finished shard is of other images under the same names: its first one
    is compared."""
    for shard in sorted(set(work.shards) - set(todo)):
        first = work.images(shard)[0]
        if read_record(work, shard)["checksums"][0] != checksum(source[first][0]):
            raise UserError(
                f"{work.out} was begun with other images: the pixels of {source.key(first)} "
                "differ; use the same images, or another OUT"
            )


def read_record(work: Work, shard: int) -> dict:
    return json.loads(work.record(shard).read_text())


# --------------------------------------------------------------------------------------
# Writing it.


@dataclass
class Networks:
    vae: VAE
    encoders: list[Encoder]
    precision: str
    device: torch.device

    @torch.no_grad()
    def rows(self, x_u8: Tensor, copies: int) -> list[Tensor]:
        """Images (n, 3, H, W) uint8 => their rows of every array, (n, copies, ...) float16."""
        x = u8_to_pm1(x_u8.to(self.device))
        views = [self._encode(pixels) for pixels in (x, x.flip(-1))[:copies]]
        return [torch.stack(rows, dim=1).half().cpu() for rows in zip(*views)]

    def _encode(self, x: Tensor) -> list[Tensor]:
        dtype = DTYPES[self.precision]
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            posterior = self.vae.encode(x)
            feats = [encoder(x).float() for encoder in self.encoders]
        return [torch.stack([posterior.mean, posterior.std], dim=1), *feats]


def load(args: argparse.Namespace, device: torch.device) -> Networks:
    encoders = [
        load_encoder(name, file, args.resolution, args.encoder_grid).to(device)
        for name, file in zip(args.encoders, args.encoder_weights)
    ]
    vae = load_vae(args.vae, args.vae_weights).to(device).eval().requires_grad_(False)
    return Networks(vae, encoders, args.precision, device)


def write_shards(
    work: Work, mine: list[int], source: Source, nets: Networks, args: argparse.Namespace
) -> None:
    """The shards of this rank, one after the other."""
    size = args.batch_size
    images = [work.images(shard) for shard in mine]
    batches = [list(i[k : k + size]) for i in images for k in range(0, len(i), size)]
    loader = iter(make_loader(source, batches, args.workers, nets.device.type == "cuda"))
    bar = tqdm(total=sum(map(len, images)), unit="img", disable=args.quiet, mininterval=1)
    with bar:
        for shard, indices in zip(mine, images):
            parts = (next(loader)[0] for _ in range(0, len(indices), size))
            write_shard(work, shard, parts, nets, bar)


def write_shard(work: Work, shard: int, parts: Iterator[Tensor], nets: Networks, bar: tqdm) -> None:
    """Arrays first, under temporary names; last, the record: sums of the latents, checksums."""
    drafts = {name: work.file(name, shard).with_suffix(".tmp") for name in work.shapes}
    num = len(work.images(shard))
    arrays = [
        np.lib.format.open_memmap(drafts[name], "w+", np.float16, (num, *shape))
        for name, shape in work.shapes.items()
    ]
    moments, checksums = ChannelMoments(work.layout["latent_shape"][0]), []
    for x_u8 in parts:
        at = slice(len(checksums), len(checksums) + len(x_u8))
        rows = nets.rows(x_u8, work.layout["copies"])
        for name, array, row in zip(work.shapes, arrays, rows):
            check_finite(name, row)
            array[at] = row.numpy()
        moments.add(*rows[0].flatten(0, 1).unbind(1))
        checksums += map(checksum, x_u8)
        bar.update(len(x_u8))
    for array, (name, draft) in zip(arrays, drafts.items()):
        array.flush()
        sync(draft)
        draft.rename(work.file(name, shard))
    write_json(work.record(shard), {"moments": moments.sums.tolist(), "checksums": checksums})


def check_finite(name: str, rows: Tensor) -> None:
    if not rows.isfinite().all():
        raise UserError(f"{name} are not finite in float16: the network does not fit these images, "
                        "or needs --precision fp32")  # fmt: skip


def finish(work: Work, source: Source, meta: dict) -> str:
    """Join the shards' records, write meta.json last, and return the line to print."""
    records = [read_record(work, shard) for shard in work.shards]
    moments = ChannelMoments(work.layout["latent_shape"][0])
    moments.sums += sum(torch.tensor(r["moments"], dtype=torch.float64) for r in records)
    mean, std = moments.result()
    checksums = np.array([c for r in records for c in r["checksums"]], dtype=np.uint32)
    write_atomically(work.out / CHECKSUMS, lambda file: np.save(file, checksums))
    write_lines(work.out / KEYS, list_keys(source))
    lengths = [len(work.images(shard)) for shard in work.shards]
    meta |= {"shards": lengths, "mean": mean.tolist(), "std": std.tolist(), "versions": versions()}
    write_json(work.out / META, meta)
    features = " encoder.cached=true" if work.layout["encoders"] else ""
    return f"cached {len(source)} images; use: vae.train=false data.latents={work.out}{features}"


if __name__ == "__main__":
    cli.run(main)
