"""Train a VAE and a SiT together (REPA-E, arXiv 2504.10483), or one of the paper's baselines.

    accelerate launch train_repae.py --config configs/imagenet256/repae-sdvae-xl2.yaml run.seed=1

The same command again continues from the newest checkpoint. Baselines are settings:
`vae.train=false` is REPA, with `loss.align.sit=0` plain SiT; `loss.diffusion.vae=1` is naive
end-to-end training.

x image in [-1, 1] (N, 3, H, W), z latent (N, C, h, w), t time (0 data, 1 noise), eps noise,
v velocity, y label, feats encoder features (N, T, D_enc), h projected SiT tokens, same shape.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from utils import cli
from utils.process.ending import say
from utils.process.signals import Signals


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_config_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and exit")
    return cli.parse_with_overrides(parser, argv)


if __name__ == "__main__":
    cli.answer_help(parse_args, saves=True)  # before the imports below, which take seconds

import torch
from torch import Tensor

from loss import gan
from loss import reconstruction as rec
from loss.alignment import alignment_loss, spatial_normalize
from loss.diffusion import velocity_loss
from loss.interpolant import interpolate
from utils import distributed
from utils.checkpoint import Checkpoints, find_start
from utils.compilation import begin_step
from utils.config import Config, load_config
from utils.config.losses import LossConfig, RegConfig
from utils.config.schema import per_rank_batch
from utils.data.base import Source
from utils.data.latents import CachedSource
from utils.data.training import open_loader
from utils.report.page import write_report
from utils.run_lock import RunLock
from utils.showing.bar import ProgressBar
from utils.showing.commands import last_words
from utils.training import tracking
from utils.training.batch import Batch, MetricAverages, make_batch, to_device
from utils.training.draws import Draws, drawing
from utils.training.ema import ema_decay
from utils.training.networks import Networks, build_networks, restore_networks
from utils.training.nonfinite import LeftOutSteps, NonFiniteError, spatial_variance
from utils.training.online_evaluation import OnlineEvaluation
from utils.training.periodic import NotSavedError, PeriodicTasks, unfinished
from utils.training.phases import phase
from utils.training.plan import Start, changes_since, open_checked, print_plan
from utils.training.trained_network import only_training

# --------------------------------------------------------------------------------------
# The method: one step, three phases.


def train_step(
    nets: Networks,
    x: Tensor,
    y: Tensor,
    draws: Draws,
    config: Config,
    step: int,
    cached: Sequence[Tensor] = (),
) -> dict[str, Tensor]:
    """One optimizer step of every network that trains; returns scalars, still on the device.

    x (N, 3, H, W) in [-1, 1], y (N,); `cached`, if anything: latents (N, F, 2, C, h, w), and tokens
    (N, F, T, D) for each encoder, both with F copies, the second mirrored.

    L_REG regularises the VAE, L_REPA aligns SiT tokens with the features of frozen encoders, L_DIFF
    is the error of the velocity. Which loss may touch which network is the whole idea
    (tests/test_routing.py checks each cell):

      term                         VAE  SiT+proj  disc    t, eps      latents entering the SiT
      L_REG = pixel+LPIPS+KL+GAN   yes  -         frozen  -           -
      align.vae * L_REPA           yes  frozen    -       drawn here  z, running stats, all labels
      discriminator loss           -    -         yes     -           x_hat.detach()
      L_DIFF + align.sit * L_REPA  no   yes       -       the same    z.detach(), batch stats,
                                                                      labels dropped
    """
    loss, metrics = config.loss, {}
    if nets.cuda_graphs:
        begin_step()
    batches = make_batch(x, y, draws, cached, config.data.hflip).split(config.run.accumulation)
    if step < config.disc.pretrain_steps:
        x_hat = reconstruct(nets, batches)
        return discriminator_phase(nets, batches, x_hat, loss.reg.lecam, step)
    # warm-ups of VAE and SiT, gan_start and the EMA count from here
    joint_step = step - config.disc.pretrain_steps
    batches = [with_targets(nets, batch, loss.align.spatial_norm) for batch in batches]
    if config.vae.train:
        z, x_hat, metrics = vae_phase(nets, batches, loss, joint_step)
        if nets.disc:
            metrics |= discriminator_phase(nets, batches, x_hat.detach(), loss.reg.lecam, step)
    else:
        z = encode_frozen(nets, batches)
    metrics |= sit_phase(nets, batches, z.detach(), loss, joint_step)
    decay = ema_decay(joint_step, config.ema.decay, config.ema.warmup)
    with phase("optimizer"):
        nets.update_ema(decay, nets.trained["sit"].left_out)
    return metrics


@torch.no_grad()
def with_targets(nets: Networks, batch: Batch, spatial_norm: float) -> Batch:
    """Compute the encoders' patch features, the targets of the alignment loss, unless cached."""
    with phase("encoder"):
        with nets.autocast():
            feats = batch.feats or [encoder(batch.x) for encoder in nets.encoders]
        if spatial_norm:
            feats = [spatial_normalize(f, spatial_norm) for f in feats]
    return replace(batch, feats=feats)


def vae_phase(
    nets: Networks, batches: list[Batch], loss: LossConfig, step: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """L_REG + align.vae * L_REPA into the VAE alone; returns z and x_hat, as they were before this
    update and without their graphs, and metrics."""
    trained, averages, outputs = nets.trained["vae"], MetricAverages(len(batches)), []
    # running statistics in the latent norm, as in sampling: images do not touch each other's z
    nets.sit.eval()
    with only_training(trained):
        for batch in trained.micro_batches(batches):
            with phase("vae_forward"), nets.autocast():
                posterior, z, x_hat = trained.ddp(batch.x, batch.draws.posterior_noise)
            with phase("reconstruction_losses"):
                terms = regularization_terms(nets, batch.x, x_hat, posterior, loss.reg, step)
            with phase("alignment"):
                terms |= terms_through_sit(nets, batch, z, loss)
            with phase("vae_backward"):
                trained.backward(averages.add_losses(terms))
            outputs.append((z.detach(), x_hat.detach()))  # the graph of this micro-batch is freed
    z, x_hat = (torch.cat(parts) for parts in zip(*outputs))
    metrics = averages.metrics("vae") | {"vae/latent_variance": spatial_variance(z)}
    return z, x_hat, metrics | {"grad_norm/vae": trained.step(step)}


def regularization_terms(
    nets: Networks, x: Tensor, x_hat: Tensor, posterior, reg: RegConfig, step: int
) -> dict[str, tuple[float, Tensor]]:
    """L_REG as {name: (weight, value)}, in float32."""
    terms = {"pixel": (reg.pixel, rec.pixel_loss(x_hat, x, reg.pixel_kind))}
    terms["kl"] = (reg.kl, rec.kl_loss(posterior.mean, posterior.logvar))
    if nets.lpips:
        value = rec.perceptual_loss(nets.lpips, x_hat, x, reg.lpips_double_scaling)
        terms["lpips"] = (reg.lpips, value)
    if nets.perceptual:
        terms["perceptual"] = (reg.perceptual, rec.perceptual_loss(nets.perceptual, x_hat, x))
    if nets.disc and step >= reg.gan_start:
        (logits,) = nets.disc(x_hat)
        terms["gan"] = (reg.gan, gan.generator_loss(logits))
    return terms


def terms_through_sit(
    nets: Networks, batch: Batch, z: Tensor, loss: LossConfig
) -> dict[str, tuple[float, Tensor]]:
    """What reaches the VAE through the frozen SiT: L_REPA; in naive end-to-end training L_DIFF as
    well."""
    align, diffusion = (loss.align.vae if batch.feats else 0.0), loss.diffusion.vae
    if not (align or diffusion):
        return {}
    d = batch.draws
    x_t, v = interpolate(nets.sit.normalize(z), d.eps, d.t, loss.diffusion.path)
    with nets.autocast():
        v_hat, h = nets.sit(x_t, d.t, batch.y, stop_at_align=not diffusion)
    terms = {"align": (align, alignment_loss(h, batch.feats))} if align else {}
    return terms | ({"diffusion": (diffusion, velocity_loss(v_hat, v))} if diffusion else {})


def discriminator_phase(
    nets: Networks, batches: list[Batch], x_hat: Tensor, lecam: float, step: int
) -> dict[str, Tensor]:
    """The discriminator learns to tell images from their reconstructions; in float32."""
    trained, averages = nets.trained["disc"], MetricAverages(len(batches))
    pairs = list(zip(batches, x_hat.chunk(len(batches))))
    with only_training(trained), phase("discriminator"):
        for batch, fakes in trained.micro_batches(pairs):
            real, fake = trained.ddp(batch.x, fakes)  # logits
            terms = {name: (1.0, v) for name, v in gan.discriminator_terms(real, fake).items()}
            if nets.lecam:
                terms["lecam"] = (lecam, nets.lecam(real, fake))
            trained.backward(averages.add_losses(terms))
            averages.add(logits_real=real.mean(), logits_fake=fake.mean())
    if nets.lecam:
        logits = torch.stack([averages.other["logits_real"], averages.other["logits_fake"]])
        nets.lecam.update(*trained.accelerator.reduce(logits, "mean"))
    return averages.metrics("disc") | {"grad_norm/disc": trained.step(step)}


def sit_phase(
    nets: Networks, batches: list[Batch], z: Tensor, loss: LossConfig, step: int
) -> dict[str, Tensor]:
    """L_DIFF + align.sit * L_REPA into the SiT and its projectors.

    The whole batch is normalised at once: batch statistics do not depend on micro-batches.
    """
    trained, averages = nets.trained["sit"], MetricAverages(len(batches))
    # batch statistics in the latent norm: they fit the latents of now, and move the running ones
    nets.sit.train()
    with phase("sit"):
        pairs = list(zip(batches, nets.sit.normalize(z).chunk(len(batches))))
    with only_training(trained), phase("sit"):
        for batch, z_n in trained.micro_batches(pairs):
            d = batch.draws
            x_t, v = interpolate(z_n, d.eps, d.t, loss.diffusion.path)
            y = drop_labels(batch.y, d.drop_label, nets.sit.null_label)
            with nets.autocast():
                v_hat, h = trained.ddp(x_t, d.t, y)
            terms = {"diffusion": (1.0, velocity_loss(v_hat, v))}
            if batch.feats:
                terms["align"] = (loss.align.sit, alignment_loss(h, batch.feats))
            trained.backward(averages.add_losses(terms))
    return averages.metrics("sit") | {"grad_norm/sit": trained.step(step)}


def drop_labels(y: Tensor, drop: Tensor, null_label: int | None) -> Tensor:
    """Labels (N,) with the null label where `drop`, for classifier-free guidance."""
    return y if null_label is None else torch.where(drop, null_label, y)


@torch.no_grad()
def encode_frozen(nets: Networks, batches: list[Batch]) -> Tensor:
    """Latents of a frozen VAE. Each step draws new samples of the posterior; with a cache, the VAE
    does not run."""
    latents = []
    for batch in batches:
        if batch.posterior is None:
            with phase("vae_forward"):  # in float32, as for a cache and for sampling
                posterior = nets.vae.encode(batch.x)
            mean, std = posterior.mean, posterior.std
        else:
            mean, std = batch.posterior.unbind(1)
        latents.append(mean + std * batch.draws.posterior_noise)
    return torch.cat(latents)


@torch.no_grad()
def reconstruct(nets: Networks, batches: list[Batch]) -> Tensor:
    """Reconstructions by the initial VAE, for the steps in which the discriminator trains alone."""
    with phase("vae_forward"), nets.autocast():
        outputs = [nets.vae(batch.x, batch.draws.posterior_noise) for batch in batches]
    return torch.cat([x_hat for _, _, x_hat in outputs])


# --------------------------------------------------------------------------------------
# The run: everything around the step.

QUICK_REPORT = 20 * 2**20  # bytes of pictures that a report is made of within seconds


def main() -> int | None:
    args = parse_args()
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        return print_plan(config)
    run, code = config.run, 0
    with Signals() as signals, RunLock(config.run_dir) as lock:
        accelerator = distributed.start(
            config.run_dir, run.trackers, run.tf32, run.rank_timeout, run.bucket_mb
        )
        try:
            train(config, accelerator, signals, lock)
        except (NonFiniteError, NotSavedError) as error:
            if accelerator.is_main_process:
                last = Checkpoints(config.run_dir).latest(report=lambda _: None)
                say(f"stopped: {error}; last good checkpoint: {last or 'none'}")
            code = 1
        distributed.Ranks().wait()  # a group that ends under a rank ends it with an error
        tracking.finish(accelerator)
        if accelerator.is_main_process:  # no other rank waits for it
            with tracking.Tolerance(lock).of("report.html", Exception):
                report_on(config.run_dir, in_haste=signals.received)
    return code


def report_on(run: Path, in_haste: bool) -> None:
    """Write report.html about a run that has trained; `in_haste`: only if it takes seconds, for who
    has told the run to stop may kill it soon."""
    size = sum(picture.stat().st_size for picture in run.glob("samples/*.png"))
    if in_haste and size > QUICK_REPORT:
        print(f"for a report: python scripts/report.py {run}")
    elif (run / tracking.METRICS_FILE).is_file():
        write_report([run], run / "report.html")
        print(f"report: {run / 'report.html'}")


def train(
    config: Config, accelerator: distributed.Accelerator, signals: Signals, lock: RunLock
) -> None:
    """Make the networks and all that surrounds them, and train; `run.on_nonfinite=rollback` may
    bring the run back to an earlier step."""
    run = config.run
    source, training_set = open_checked(config)  # before anything is loaded or written
    distributed.Ranks().on_main(lock.acquire)
    checkpoints = Checkpoints(config.run_dir, run.keep_last, run.milestone_every)
    left_out = distributed.Ranks().on_main(lambda: LeftOutSteps(config))
    checkpoint, first = find_start(run.resume, checkpoints)
    start = Start(checkpoint, first, checkpoint)
    # another run may have written here, and ended, between the checks and the lock
    distributed.Ranks().on_main(lambda: changes_since(config, start, source))
    if first >= run.steps and not unfinished(config, first):
        accelerator.print(f"step {first} of {run.steps} is done; raise run.steps to continue")
        return
    evaluation = OnlineEvaluation(config, source)
    cache = training_set.cache if isinstance(training_set, CachedSource) else None
    nets, latent_stats = build_networks(config, source, accelerator, checkpoint, cache)
    tracker = tracking.start(config, accelerator, first, nets, latent_stats, checkpoint, lock)
    stop = distributed.StopSignal(signals)
    periodic = PeriodicTasks(config, source, accelerator, checkpoints, tracker, evaluation, stop)
    periodic.catch_up(nets, first)
    while True:
        try:
            return run_steps(
                config, accelerator, training_set, nets, periodic, left_out, stop, first
            )
        except NonFiniteError as error:
            checkpoint, first = left_out.roll_back(error, checkpoints, (checkpoint, first))
            restore_networks(nets, checkpoint)
            tracker.restart(checkpoint, first)


def run_steps(
    config: Config,
    accelerator: distributed.Accelerator,
    training_set: Source,
    nets: Networks,
    periodic: PeriodicTasks,
    left_out: LeftOutSteps,
    stop: distributed.StopSignal,
    first: int,
) -> None:
    """The steps from `first` on, until `run.steps`, a signal, or a loss that is not finite."""
    run, tracker, ranks = config.run, periodic.tracker, accelerator.num_processes
    shape = (per_rank_batch(config, ranks), *nets.vae.latent_shape(config.data.resolution))
    draws = drawing(config, accelerator.process_index, accelerator.device)
    bar = ProgressBar(first, run.steps, run.batch_size, accelerator.is_main_process)
    loader = open_loader(config, training_set, accelerator, first, left_out.steps)

    for step, batch in left_out.batches(tracker.timed(loader), first, run.steps):
        if batch is not None:
            x, y, cached = to_device(batch, accelerator.device, nets.channels_last)
            tracker.add(train_step(nets, x, y, draws(shape, step=step), config, step, cached), step)
        bar.update()
        if loader.error:
            stop.request()
        stopping = stop.agreed(step + 1)
        row = periodic.run(nets, step + 1, step + 1 == run.steps, stopping)
        bar.show(row)
        if stopping or periodic.stopped:
            saved = periodic.checkpoints.folder / f"{step + 1:07d}"
            text = f"told to stop at step {step + 1}; saved {saved}; run the same command to go on"
            accelerator.print(f"\n{text}")
            break
    else:
        bar.close()
        last = periodic.checkpoints.path(run.steps)
        accelerator.print(last_words(config, periodic.source, last))
    bar.close()
    if loader.error:
        raise loader.error


if __name__ == "__main__":
    cli.run(main)
