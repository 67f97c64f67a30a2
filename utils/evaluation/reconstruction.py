"""A VAE's reconstructions against their originals: rFID, PSNR, SSIM, LPIPS, latent statistics.

What each metric is, and how the record states it: `VAE_METRICS` in utils/evaluation/metrics.py.
Pictures are compared as uint8, the reconstructions clamped and rounded.
"""

from collections.abc import Callable

import torch

from models.errors import UserError
from models.vae import VAE
from utils.data.images import pm1_to_u8, u8_to_pm1
from utils.distributed import Ranks
from utils.evaluation.formulas.frechet import Statistics
from utils.evaluation.formulas.pictures import LatentStatistics
from utils.evaluation.images.image_sets import ImageSet
from utils.evaluation.metrics import VAE_METRICS, Pair, Pictures, VaeMetric, select_metrics
from utils.evaluation.networks import FeatureNet, load_network
from utils.evaluation.options import Options
from utils.evaluation.report import add_result, assess_comparability, new_record
from utils.evaluation.statistics import Collector, rank_batches
from utils.precision import exact_float32
from utils.random import generator


class Reconstruction:
    """Runs a VAE on batches and sums the metrics; every rank calls `add` equally often."""

    def __init__(self, vae: VAE, metrics: list[VaeMetric], *, posterior: str, seed: int, lpips):
        self.vae, self.metrics, self.lpips = vae, metrics, lpips
        self.posterior, self.seed = posterior, seed
        self.sums = {metric.name: 0.0 for metric in metrics if metric.pictures}
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
        if self.latents is None:
            self.latents = LatentStatistics(z.shape[1], z.device)
        self.latents.add(z[:n])
        if n:
            pictures = Pictures(x_u8[:n], y_u8[:n], x[:n], x_hat[:n], self.lpips)
            for metric in self.metrics:
                if metric.pictures:
                    self.sums[metric.name] += metric.pictures(pictures).sum().item()
        return y_u8

    def _sample(self, posterior, start: int) -> torch.Tensor:
        """Noise keyed by (seed, image index): the same for any batch size and number of ranks."""
        shape = posterior.mean.shape
        noise = [torch.randn(shape[1:], generator=generator("evaluate vae", self.seed, start + i))
                 for i in range(shape[0])]  # fmt: skip
        return posterior.mean + posterior.std * torch.stack(noise).to(posterior.mean)

    def result(self, total: int, ranks: Ranks) -> dict:
        """Named values over all images of all ranks, in the order of the metrics."""
        sums = torch.tensor(list(self.sums.values()), dtype=torch.float64, device=ranks.device)
        means = dict(zip(self.sums, (ranks.sum(sums) / total).tolist()))
        assert self.latents is not None  # every rank has been given a batch
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
    lpips_net: torch.nn.Module | None = None, net: FeatureNet | None = None,
    ranks: Ranks | None = None, progress: Callable[[str], Callable[[int], None]] | None = None,
) -> dict:  # fmt: skip
    """Reconstruct `images` and measure => a JSON-able record (utils.evaluation.report).

    Every rank makes the call and gets the record. `options.metrics`: names in `VAE_METRICS`;
    lpips needs `lpips_net`. `posterior`: "mode", or "sample" drawn from (seed, image index).
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
    batches = rank_batches(images, ranks, options.batch_size, progress and progress("images"))
    statistics = measure(run, batches, len(images), net, ranks, options.batch_size)
    values = run.result(len(images), ranks)
    record = new_record(net, images, ranks.on_main(images.fingerprint), None)
    record["protocol"] = {each.protocol_name or each.name: each.protocol for each in metrics}
    record["protocol"] |= {"posterior": posterior, "seed": seed if posterior == "sample" else None}

    def complete() -> dict:
        if net:
            original, reconstructed = statistics
            pair = Pair(original, reconstructed, net, options.pr_mode)
            for row in filter(None, (metric.features for metric in metrics)):
                add_result(record, row, row.compute(pair), net)
        record["metrics"] |= values
        assess_comparability(record, net, published_reference=True)
        return record

    return ranks.on_main(complete)


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
    for x_u8, start, n in batches:
        x_u8 = x_u8.to(ranks.device)
        with exact_float32():
            y_u8 = run.add(x_u8, start, n)
        if net is None:
            continue
        for i, pictures in enumerate((x_u8, y_u8)):
            feats = net(pictures)["pool"]
            if len(collectors) == i:
                dim, halves = feats.shape[1], i == 0 and not net.published
                collectors.append(Collector(total, dim, ranks, keep_rows=rows, halves=halves))
            collectors[i].add(feats[:n], start, batch_size)
    return [collector.result() for collector in collectors]
