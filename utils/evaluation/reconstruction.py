"""A VAE's reconstructions against their originals: rFID, PSNR, SSIM, LPIPS, latent statistics.

What each metric is, and how the record states it: `VAE_METRICS` in utils/evaluation/metrics.py.
Pictures are compared as uint8, the reconstructions clamped and rounded.
"""

from collections.abc import Callable
from contextlib import closing

import torch

from models.checks.errors import UserError
from models.vae import VAE
from utils.data.images import pm1_to_u8, u8_to_pm1
from utils.distributed import Ranks
from utils.evaluation.comparable import VALIDATION, assess, is_validation_set
from utils.evaluation.formulas.frechet import Statistics
from utils.evaluation.formulas.pictures import LatentStatistics
from utils.evaluation.images.image_sets import ImageSet, SourceImages
from utils.evaluation.images.reader import upload
from utils.evaluation.metrics import (
    PAPER_SIZE,
    VAE_METRICS,
    Pair,
    Pictures,
    VaeMetric,
    select_metrics,
)
from utils.evaluation.networks import FeatureNet, load_network
from utils.evaluation.options import Options
from utils.evaluation.report import add_result, metric_name, new_record
from utils.evaluation.statistics import Collector, Progress, rank_batches
from utils.precision import exact_float32
from utils.random import generator


class Reconstruction:
    """Runs a VAE on batches and sums the metrics on its device; every rank calls `add` equally
    often, and the host waits for the device in none of these calls."""

    def __init__(self, vae: VAE, metrics: list[VaeMetric], *, posterior: str, seed: int, lpips):
        self.vae, self.metrics, self.lpips = vae, metrics, lpips
        self.posterior, self.seed = posterior, seed
        self.of_pictures = {m.name: m.pictures for m in metrics if m.pictures}
        # of each metric in `of_pictures`, over the images so far; None before the first batch
        self.sums: torch.Tensor | None = None
        self.latents: LatentStatistics | None = None

    @torch.no_grad()
    def add(self, x_u8: torch.Tensor, start: int, n: int) -> torch.Tensor:
        """Images (n', 3, H, W) uint8 from global index `start`, of which n <= n' count; returns
        their reconstructions as uint8."""
        x = u8_to_pm1(x_u8)
        posterior = self.vae.encode(x)
        z = posterior.mode() if self.posterior == "mode" else self._sample(posterior, start)
        x_hat = self.vae.decode(z).clamp(-1, 1)
        y_u8 = pm1_to_u8(x_hat, "round")
        if self.latents is None or self.sums is None:
            self.latents = LatentStatistics(z.shape[1], z.device)
            self.sums = z.new_zeros(len(self.of_pictures), dtype=torch.float64)
        self.latents.add(z[:n])
        if n:
            pictures = Pictures(x_u8[:n], y_u8[:n], x[:n], x_hat[:n], self.lpips)
            for total, values in zip(self.sums, self.of_pictures.values()):
                total += values(pictures).sum(dtype=torch.float64)
        return y_u8

    def _sample(self, posterior, start: int) -> torch.Tensor:
        """Noise keyed by (seed, image index): the same for any batch size and number of ranks."""
        shape = posterior.mean.shape
        drawn = [torch.randn(shape[1:], generator=generator("evaluate vae", self.seed, start + i))
                 for i in range(shape[0])]  # fmt: skip
        noise = upload(torch.stack(drawn), posterior.mean.device).to(posterior.mean.dtype)
        return posterior.mean + posterior.std * noise

    def result(self, total: int, ranks: Ranks) -> dict:
        """Named values over all images of all ranks, in the order of the metrics."""
        assert self.latents is not None and self.sums is not None  # every rank was given a batch
        means = dict(zip(self.of_pictures, (ranks.sum(self.sums) / total).tolist()))
        self.latents.sums = ranks.sum(self.latents.sums)
        assert round(self.latents.sums[0, 0].item()) == total, (self.latents.sums[0, 0], total)
        values = {}
        for metric in self.metrics:
            if metric.pictures:
                values[metric.name.upper()] = means[metric.name]
            elif metric.latents:
                values |= metric.latents(self.latents)
        return values


def evaluate_vae(
    vae: VAE, images: ImageSet, options: Options, *, posterior: str = "mode", seed: int = 0,
    lpips_net: torch.nn.Module | None = None, lpips_sha256: str | None = None,
    net: FeatureNet | None = None, ranks: Ranks | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> dict:  # fmt: skip
    """Reconstruct `images` and measure => a JSON-able record (utils.evaluation.report).

    Every rank makes the call and gets the record. `options.metrics`: names in `VAE_METRICS`;
    lpips needs `lpips_net`, and is comparable with papers only with the sha256 of its weight file.
    `posterior`: "mode", or "sample" drawn from (seed, image index).
    """
    metrics = select_metrics(VAE_METRICS, options.metrics)
    ranks = ranks or Ranks(device=net.device if net else None)
    check_images(images, vae, metrics)
    if net is None and any(metric.features for metric in metrics):
        net = load_network(options, ranks)
    assert lpips_net is not None or not any(metric.needs_lpips for metric in metrics)
    vae.to(ranks.device).eval()
    lpips_net = lpips_net.to(ranks.device) if lpips_net is not None else None
    run = Reconstruction(vae, metrics, posterior=posterior, seed=seed, lpips=lpips_net)
    batches = rank_batches(
        images, ranks, options.batch_size, progress and progress("images"), workers=options.workers
    )
    with closing(batches):
        statistics = measure(run, batches, len(images), net, ranks, options.batch_size)
    values = run.result(len(images), ranks)
    record = new_record(net, images, ranks.on_main(images.fingerprint), None)
    record["protocol"] = {each.protocol_name or each.name: each.protocol for each in metrics}
    record["protocol"] |= {"posterior": posterior, "seed": seed if posterior == "sample" else None}
    record["protocol"]["images"] = ranks.on_main(lambda: _origin(images))
    if lpips_net:
        record["protocol"]["lpips_weights_sha256"] = lpips_sha256

    def complete() -> dict:
        if net:
            original, reconstructed = statistics
            pair = Pair(original, reconstructed, net, options.pr_mode)
            for row in filter(None, (metric.features for metric in metrics)):
                add_result(record, row, row.compute(pair), net)
        record["metrics"] |= values
        names = {m.name.upper(): m.name for m in metrics if m.pictures}
        if net:
            names |= {metric_name(m.features, net, record["n"]): m.name
                      for m in metrics if m.features}  # fmt: skip
        assess(record, names)
        return record

    return ranks.on_main(complete)


def _origin(images: ImageSet) -> str:
    """Which set the images are, as far as their names tell."""
    keys = []
    if isinstance(images, SourceImages) and len(images) == PAPER_SIZE:
        keys = images.source.list_keys()
    return VALIDATION if is_validation_set(keys) else "not known to be a published set"


def check_images(images: ImageSet, vae: VAE, metrics: list[VaeMetric]) -> None:
    """`UserError` unless the VAE and the metrics take images of this number and size."""
    (h, w), num = images.size, len(images)
    for side in (h, w):
        vae.latent_shape(side)
    for metric in metrics:
        if num < metric.least_images:
            raise UserError(f"{images.name} has {num} image(s), {metric.name} needs at least "
                            f"{metric.least_images}; give more images")  # fmt: skip
        if min(h, w) < metric.least_side:
            raise UserError(f"{images.name} has {h}x{w} images, {metric.name} needs a side of at "
                            f"least {metric.least_side}; leave it out of --metrics")  # fmt: skip


def measure(
    run: Reconstruction, batches, total: int, net: FeatureNet | None, ranks: Ranks, batch_size: int
) -> list[Statistics]:
    """One pass over `rank_batches` of `total` images: through the VAE, and originals and
    reconstructions through `net` => the statistics of their features; [] without a `net`."""
    rows = any(m.features and (m.features.reference_rows or m.features.sample_rows)
               for m in run.metrics)  # fmt: skip
    collectors: list[Collector] = []
    for on_host, start, n in batches:
        x_u8 = upload(on_host, ranks.device)
        with exact_float32():
            y_u8 = run.add(x_u8, start, n)
        if net is None:
            continue
        for i, pictures in enumerate((on_host if net.prepare else x_u8, y_u8)):
            feats = net(pictures)["pool"]
            if len(collectors) == i:
                dim = feats.shape[1]
                groups = 2 if i == 0 and not net.published else 1
                collectors.append(Collector(total, dim, ranks, keep_rows=rows, groups=groups))
            collectors[i].add(feats[:n], start, batch_size)
    return [collector.result() for collector in collectors]
