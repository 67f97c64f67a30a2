"""Train a VAE and a SiT together (REPA-E, arXiv 2504.10483), or one of the paper's baselines.

    accelerate launch train_repae.py --config configs/imagenet256/repae-sdvae-xl2.yaml run.seed=1

The same command again goes on from the newest checkpoint. Baselines are configs: `vae.train=false`
is REPA, with `loss.align.sit=0` plain SiT; `loss.diffusion.to_vae=true` is naive end-to-end.

x image in [-1, 1] (N, 3, H, W), z latent (N, C, h, w), t time (0 data, 1 noise), eps noise,
v velocity, y label, feats frozen-encoder tokens (N, T, D_enc), h SiT tokens, projected alike.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from loss import reconstruction as rec
from loss.alignment import alignment_loss, spatial_normalize
from loss.diffusion import velocity_loss
from loss.interpolant import interpolate
from models.errors import UserError
from utils import cli, distributed, tracking
from utils.build import Nets, build_nets, describe, save_nets
from utils.checkpoint import Checkpoints, find_start
from utils.config import Config, load_config, per_rank_batch, to_yaml
from utils.draws import Draws, draw
from utils.ema import ema_decay, update_ema
from utils.examples import join_cache, open_loader, open_training_data
from utils.images import u8_to_pm1
from utils.learner import only_training
from utils.online_evaluation import OnlineEvaluation
from utils.preview import Previewer

# --------------------------------------------------------------------------------------
# The method: one step, three phases.


@dataclass
class Part:
    """One micro-batch, and what one phase leaves for the next."""

    x: torch.Tensor  # (N, 3, H, W) in [-1, 1]
    y: torch.Tensor  # (N,) int64
    draws: Draws
    posterior: torch.Tensor | None = None  # cached (N, 2, C, h, w): mean and std
    feats: list[torch.Tensor] = field(default_factory=list)  # of the frozen encoders
    z: torch.Tensor | None = None  # set by the VAE phase, detached
    x_hat: torch.Tensor | None = None  # set by the VAE phase, detached


def train_step(
    nets: Nets,
    x: torch.Tensor,
    y: torch.Tensor,
    draws: Draws,
    config: Config,
    step: int,
    cached: Sequence[torch.Tensor] = (),
) -> dict[str, torch.Tensor]:
    """One optimizer step of every network that trains; returns scalars, still on the device.

    x (N, 3, H, W) in [-1, 1], y (N,); `cached`, if anything: latents (N, F, 2, C, h, w), and tokens
    (N, F, T, D) for each encoder, both with F copies, the second mirrored.

    Which loss may touch which network is the whole idea (tests/test_routing.py checks each cell):

      term                         VAE  SiT+proj  disc    t, eps      latents entering the SiT
      L_REG = pixel+LPIPS+KL+GAN   yes  -         frozen  -           -
      align.vae * L_REPA           yes  frozen    -       drawn here  z, running stats, all labels
      hinge                        -    -         yes     -           x_hat.detach()
      L_DIFF + align.sit * L_REPA  no   yes       -       the same    z.detach(), batch stats,
                                                                      labels dropped
    """
    parts = make_parts(x, y, draws, cached, config.run.accumulation)
    if step < config.disc.alone_steps:
        return discriminator_alone(nets, parts, config, step)
    step -= config.disc.alone_steps
    encode_targets(nets, parts, config)
    if config.vae.train:
        metrics = vae_phase(nets, parts, config, step)
        if nets.disc:
            metrics |= discriminator_phase(nets, parts, config, step + config.disc.alone_steps)
    else:
        metrics = frozen_vae_phase(nets, parts)
    metrics |= sit_phase(nets, parts, config, step)
    update_ema(nets.ema, nets.sit, ema_decay(step, config.ema.decay, config.ema.warmup))
    return metrics


def make_parts(x, y, draws: Draws, cached: Sequence[torch.Tensor], k: int) -> list[Part]:
    """The micro-batches, mirrored where `draws.flip` says so."""
    x = torch.where(draws.flip[:, None, None, None], x.flip(-1), x)
    parts = [Part(*p) for p in zip(x.chunk(k), y.chunk(k), draws.split(k))]
    if cached:
        rows = torch.arange(len(y), device=y.device)
        posterior, *feats = (c[rows, draws.flip.long()].float() for c in cached)
        for part, p, *f in zip(parts, posterior.chunk(k), *(f.chunk(k) for f in feats)):
            part.posterior, part.feats = p, f
    return parts


@torch.no_grad()
def encode_targets(nets: Nets, parts: list[Part], config: Config) -> None:
    """What the SiT's tokens are aligned with."""
    alpha = config.loss.align.spatial_norm
    for part in parts:
        with nets.autocast():
            part.feats = part.feats or [encoder(part.x) for encoder in nets.encoders]
        if alpha:
            part.feats = [spatial_normalize(f, alpha) for f in part.feats]


def vae_phase(nets: Nets, parts: list[Part], config: Config, step: int) -> dict[str, torch.Tensor]:
    """L_REG + align.vae * L_REPA into the VAE alone."""
    vae, total = nets.learn["vae"], Sums(len(parts))
    nets.sit.eval()  # running statistics in the latent norm
    with only_training(vae):
        for part in vae.micro_batches(parts):
            with nets.autocast():
                posterior, z, x_hat = vae.ddp(part.x, part.draws.posterior_noise)
            terms = regularisation_terms(nets, part.x, x_hat, posterior, config, step)
            terms |= terms_through_sit(nets, part, z, config)
            vae.backward(total.add(terms))
            part.z, part.x_hat = z.detach(), x_hat.detach()
    return total.metrics("vae") | {"grad_norm/vae": vae.step(step)}


def regularisation_terms(nets: Nets, x, x_hat, posterior, config: Config, step: int) -> dict:
    """L_REG as {name: (weight, value)}, in float32."""
    reg = config.loss.reg
    terms = {"pixel": (reg.pixel, rec.pixel_loss(x_hat, x, reg.pixel_kind))}
    terms["kl"] = (reg.kl, rec.kl_loss(posterior.mean, posterior.logvar))
    if nets.lpips:
        value = rec.perceptual_loss(nets.lpips, x_hat, x, reg.lpips_double_scaling)
        terms["lpips"] = (reg.lpips, value)
    if nets.disc and step >= reg.gan_start:
        (logits,) = nets.disc(x_hat.float())
        terms["gan"] = (reg.gan, rec.generator_loss(logits))
    return terms


def terms_through_sit(nets: Nets, part: Part, z: torch.Tensor, config: Config) -> dict:
    """What reaches the VAE through the frozen SiT: L_REPA; for naive end-to-end L_DIFF as well."""
    align = config.loss.align.vae if part.feats else 0.0
    naive = config.loss.diffusion.to_vae
    if not (align or naive):
        return {}
    d = part.draws
    x_t, v = interpolate(nets.sit.normalize(z), d.eps, d.t, config.loss.diffusion.path)
    with nets.autocast():
        v_hat, h = nets.sit(x_t, d.t, part.y, stop_at_align=not naive)
    terms = {"align": (align, alignment_loss(h, part.feats))} if align else {}
    return terms | ({"diffusion": (1.0, velocity_loss(v_hat, v))} if naive else {})


@torch.no_grad()
def frozen_vae_phase(nets: Nets, parts: list[Part]) -> dict[str, torch.Tensor]:
    """Latents of a VAE that does not train, drawn anew in every step, from the cache if there is
    one."""
    for part in parts:
        if part.posterior is None:
            with nets.autocast():
                posterior = nets.vae.encode(part.x)
            mean, std = posterior.mean, posterior.std
        else:
            mean, std = part.posterior.unbind(1)
        part.z = mean + std * part.draws.posterior_noise
    return {}


def discriminator_alone(nets: Nets, parts: list[Part], config: Config, step: int) -> dict:
    """The first `disc.alone_steps` steps: a random discriminator learns on the reconstructions of
    the starting VAE before it teaches that VAE; nothing else moves."""
    for part in parts:
        with torch.no_grad(), nets.autocast():
            _, _, part.x_hat = nets.vae(part.x, part.draws.posterior_noise)
    return discriminator_phase(nets, parts, config, step)


def discriminator_phase(nets: Nets, parts: list[Part], config: Config, step: int) -> dict:
    """Hinge loss on the same reconstructions, into the discriminator alone; in float32."""
    disc, total = nets.learn["disc"], Sums(len(parts))
    with only_training(disc):
        for part in disc.micro_batches(parts):
            real, fake = disc.ddp(part.x, part.x_hat.float())
            terms = {"hinge": (1.0, rec.hinge_loss(real, fake))}
            if nets.lecam:
                terms["lecam"] = (config.loss.reg.lecam, nets.lecam(real, fake))
            disc.backward(total.add(terms))
            total.note(logits_real=real.mean(), logits_fake=fake.mean())
    if nets.lecam:
        logits = torch.stack([total.notes["logits_real"], total.notes["logits_fake"]])
        nets.lecam.update(*disc.accelerator.reduce(logits, "mean"))
    return total.metrics("disc") | {"grad_norm/disc": disc.step(step)}


def sit_phase(nets: Nets, parts: list[Part], config: Config, step: int) -> dict[str, torch.Tensor]:
    """L_DIFF + align.sit * L_REPA into the SiT and its projectors; z is cut off from the VAE.

    The whole batch is normalised at once: batch statistics do not depend on micro-batches.
    """
    sit, total = nets.learn["sit"], Sums(len(parts))
    nets.sit.train()  # batch statistics in the latent norm, which move the running ones
    z_n = nets.sit.normalize(torch.cat([part.z for part in parts])).chunk(len(parts))
    with only_training(sit):
        for part, z in sit.micro_batches(list(zip(parts, z_n))):
            d = part.draws
            x_t, v = interpolate(z, d.eps, d.t, config.loss.diffusion.path)
            with nets.autocast():
                v_hat, h = sit.ddp(x_t, d.t, drop_labels(part.y, d.drop_label, nets.sit.null_label))
            terms = {"diffusion": (1.0, velocity_loss(v_hat, v))}
            if part.feats:
                terms["align"] = (config.loss.align.sit, alignment_loss(h, part.feats))
            sit.backward(total.add(terms))
    return total.metrics("sit") | {"grad_norm/sit": sit.step(step)}


def drop_labels(y: torch.Tensor, drop: torch.Tensor, null_label: int | None) -> torch.Tensor:
    """Labels (N,) with the null label where `drop`, for classifier-free guidance."""
    return y if null_label is None else torch.where(drop, null_label, y)


class Sums:
    """The terms of one phase, averaged over its micro-batches."""

    def __init__(self, parts: int):
        self.parts, self.losses, self.notes = parts, {}, {}

    def add(self, terms: dict[str, tuple[float, torch.Tensor]]) -> torch.Tensor:
        """{name: (weight, value)} of one micro-batch => its share of the loss to differentiate."""
        self._average(self.losses, {name: value for name, (_, value) in terms.items()})
        return sum(weight * value for weight, value in terms.values()) / self.parts

    def note(self, **values: torch.Tensor) -> None:
        """Average values that are logged, but are no loss."""
        self._average(self.notes, values)

    def _average(self, means: dict, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            means[name] = means.get(name, 0.0) + value.detach() / self.parts

    def metrics(self, phase: str) -> dict[str, torch.Tensor]:
        """The unweighted means."""
        losses = {f"loss/{phase}/{name}": mean for name, mean in self.losses.items()}
        return losses | {f"{phase}/{name}": mean for name, mean in self.notes.items()}


# --------------------------------------------------------------------------------------
# The run: everything around the step.


def main() -> int | None:
    args = parse_args()
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        return print_plan(config)
    accelerator = distributed.start(config.run_dir, config.run.trackers, config.run.tf32)
    try:
        train(config, accelerator)
    except tracking.NonFiniteError as error:
        if accelerator.is_main_process:
            last = Checkpoints(config.run_dir).latest(report=lambda _: None)
            print(f"stopped: {error}; last good checkpoint: {last or 'none'}", file=sys.stderr)
        return 1
    finally:
        accelerator.end_training()


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML; several are merged in order",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and exit")
    args, args.overrides = parser.parse_known_args()
    return args


def print_plan(config: Config) -> None:
    """--dry-run: the resolved config and what follows from it. Needs neither weights nor data."""
    try:
        source = open_training_data(config)
    except UserError as error:
        print(f"note: {error}")
        source = None
    print(to_yaml(config))
    if source:
        join_cache(config, source)
    for name, value in describe(config, source, distributed.launched_ranks()).items():
        print(f"{name:>16}: {value}")


def train(config: Config, accelerator: distributed.Accelerator) -> None:
    """Train until `run.steps`, a signal, or a loss that is not finite."""
    run, rank, ranks = config.run, accelerator.process_index, accelerator.num_processes
    source = open_training_data(config)
    describe(config, source, ranks)  # raises where shapes do not meet, before anything is loaded
    examples = join_cache(config, source)
    checkpoints = Checkpoints(config.run_dir, run.keep_last, run.milestone_every)
    checkpoint, state = find_start(run.resume, checkpoints, accelerator)
    first = state.get("step", 0)
    if first >= run.steps:
        accelerator.print(f"step {first} of {run.steps} is done; raise run.steps to go on")
        return
    nets = build_nets(config, source, accelerator, checkpoint)
    tracker = tracking.start(config, accelerator, first, nets.starting_stats)
    after = After(config, source, accelerator, checkpoints, tracker)
    latent_shape = nets.vae.latent_shape(config.data.resolution)
    shape = (per_rank_batch(config, ranks), *latent_shape)
    stop = distributed.StopSignal(accelerator)
    bar = tracking.progress_bar(first, run.steps, accelerator)

    for step, batch in enumerate(open_loader(config, examples, accelerator, first), start=first):
        x_u8, y, *cached = (b.to(accelerator.device, non_blocking=True) for b in batch)
        draws = draw(config, step, rank, shape, accelerator.device)
        tracker.add(train_step(nets, u8_to_pm1(x_u8), y, draws, config, step, cached), step)
        bar.update()
        stopping = stop.agreed(step + 1)
        after.step(nets, step + 1, last=stopping or step + 1 == run.steps, bar=bar)
        if stopping:
            accelerator.print(f"\ntold to stop at step {step + 1}; run the same command to go on")
            break
    bar.close()


class After:
    """What is due after a step: a log line, a checkpoint, and only then pictures and evaluation,
    so that nothing that fails in them costs work."""

    def __init__(self, config: Config, source, accelerator, checkpoints: Checkpoints, tracker):
        self.config, self.accelerator = config, accelerator
        self.checkpoints, self.tracker, self.num_images = checkpoints, tracker, len(source)
        self.previewer = Previewer(config, source, accelerator)
        self.evaluation = OnlineEvaluation(config, accelerator)

    def step(self, nets: Nets, done: int, last: bool, bar: tqdm) -> None:
        """`done` steps are done; `last`: there will be no other."""
        run = self.config.run
        saving = last or done % run.save_every == 0
        if saving or done % run.log_every == 0:
            tracking.show(bar, self.tracker.flush(done, extra=loss_scales(nets)))
        if saving:
            self.save(nets, done)
        if self.previewer.is_due(done, last):
            self.previewer.write(nets, done)
        if self.evaluation.is_due(done):
            self.tracker.write(done, self.evaluation.measure(nets))
        self.tracker.restart_clock()

    def save(self, nets: Nets, done: int) -> None:
        """One checkpoint, written by the main process while the others wait."""
        run = self.config.run
        state = {
            "epoch": done * run.batch_size / self.num_images,
            "seed": run.seed,
            "ranks": self.accelerator.num_processes,
            "path": self.config.loss.diffusion.path,
        }
        if self.accelerator.is_main_process:
            self.checkpoints.save(done, lambda folder: save_nets(nets, folder), state)
        self.accelerator.wait_for_everyone()


def loss_scales(nets: Nets) -> dict[str, float]:
    """fp16 only: the loss scale of each network."""
    learners = nets.learn.items()
    return {f"loss_scale/{n}": v.scaler.get_scale() for n, v in learners if v.scaler.is_enabled()}


if __name__ == "__main__":
    cli.run(main)
