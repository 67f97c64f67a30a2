"""Checks of numbers that must meet: batch and ranks; EMA and steps; latents, patches, features."""

from collections.abc import Generator, Iterator

from models.autoencoders.names import published_vae
from models.vae import vae_weight_file
from utils.config.schema import Config, per_rank_batch
from utils.data.base import Source
from utils.doctor.findings import Finding, check, ok, warn
from utils.showing.summary import parameters
from utils.training.networks import Networks
from utils.training.nonfinite import ema_warning
from utils.training.plan import Start, check_networks

PUBLISHED_BATCH = 256  # images of one step in all of the paper's runs


@check("batch")
def check_batch(
    c: Config, ranks: int, source: Source | None, published: bool
) -> Generator[Finding, None, int | None]:
    """The global batch splits, and is the published one where a published run is repeated; returns
    the images of one rank in one step."""
    run, rank_batch = c.run, per_rank_batch(c, ranks)
    micro = rank_batch // run.accumulation
    text = f"{run.batch_size} = {micro} x {ranks} rank(s) x {run.accumulation} micro-batch(es)"
    if source:
        text += f"; {run.steps:,} steps are {run.steps * run.batch_size / len(source):,.1f} epochs"
    differs = published and run.batch_size != PUBLISHED_BATCH
    advice = f"; the published learning rates belong to run.batch_size={PUBLISHED_BATCH}"
    yield warn(text + advice) if differs else ok(text)
    return rank_batch


@check("ema")
def check_ema(c: Config) -> Iterator[Finding]:
    """What is sampled, an average over the last steps, has forgotten the start of the run."""
    if found := ema_warning(c):
        yield warn(found[1])
        return
    steps, reach = c.run.steps - c.disc.pretrain_steps, 1 / (1 - c.ema.decay)
    if c.ema.warmup:  # the decay grows to (1 + steps) / (10 + steps)
        reach = min(reach, (10 + steps) / 9)
    yield ok(f"samples are of the average of about {reach:,.0f} of {steps:,} steps")


@check("tokens")
def check_tokens(
    c: Config, source: Source | None, found: Start | None
) -> Generator[Finding, None, Networks | None]:
    """Latents, patches and encoder features meet, and the checkpoint that the run begins with fits;
    returns the networks on the meta device."""
    start = found or Start(None, 0, None)
    known = start.checkpoint or published_vae(c.vae.name)
    file = None if known else vae_weight_file(c.vae.name, "hub")
    if file and file.find() is None:
        yield warn(f"unknown: config.json of {c.vae.name} is not here, and not downloaded for this")
        return None
    nets, inherited = check_networks(c, source, start, read_all=False)
    yield from map(warn, inherited.notes if inherited else [])
    latents = "x".join(map(str, nets.vae.latent_shape(c.data.resolution)))
    sizes = parameters(nets.vae, nets.sit, nets.disc)
    aligned = f", aligned with {', '.join(c.encoder.names)}" if c.uses_encoder else ""
    tokens = f"{nets.sit.grid}x{nets.sit.grid} tokens of {latents} latents"
    yield ok(f"{tokens}{aligned}; parameters: {sizes}")
    return nets
