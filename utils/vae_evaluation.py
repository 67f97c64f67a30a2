"""A VAE's reconstructions against their originals: rFID, PSNR, SSIM, LPIPS, latent statistics.

Protocol (stated in the record): pictures are compared as uint8, reconstructions clamped and
rounded; PSNR and SSIM per image, then averaged; LPIPS-VGG on [-1, 1], clamped. rFID is the Frechet
distance between the features of the same images before and after.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from models.errors import UserError
from models.vae import VAE
from utils.draws import generator
from utils.evaluation import Options
from utils.feature_stats import Collector, Ranks, Statistics, frechet, walk
from utils.features import FeatureNet, exact_float32
from utils.image_sets import ImageSet
from utils.images import pm1_to_u8, u8_to_pm1
from utils.metrics import LatentStatistics, psnr, ssim
from utils.report import add_distance, judge, metric_name, new_record

VAE_METRICS = ("rfid", "psnr", "ssim", "lpips", "latents")
PER_IMAGE = ("psnr", "ssim", "lpips")
PROTOCOLS = {  # name in the record, and what was done
    "rfid": ("frechet", "features of the same images before and after, both as uint8"),
    "psnr": ("psnr", "dB per image on uint8, mse floored at 1e-10 of [0, 1], mean over images"),
    "ssim": (
        "ssim",
        "scikit-image on uint8 RGB, 11x11 Gaussian window of sigma 1.5, mean over images",
    ),
    "lpips": ("lpips", "lpips package, net=vgg, version 0.1, inputs in [-1, 1], clamped"),
    "latents": (
        "latents",
        "un-normalised posterior; spatial variance of a map, and total variation = sum of absolute "
        "differences of neighbours in a map, both averaged over maps",
    ),
}


class Reconstruction:
    """Runs a VAE on batches and keeps the sums; every rank calls `add` equally often."""

    def __init__(self, vae: VAE, names: list[str], *, posterior: str, seed: int, lpips_net=None):
        self.vae, self.names, self.posterior, self.seed = vae, names, posterior, seed
        self.lpips_net = lpips_net
        self.sums = dict.fromkeys([name for name in PER_IMAGE if name in names], 0.0)
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
            self._compare(x_u8[:n], y_u8[:n], x[:n], x_hat[:n])
        return y_u8

    def _sample(self, posterior, start: int) -> torch.Tensor:
        """Noise keyed by (seed, image index): the same for any batch size and number of ranks."""
        shape = posterior.mean.shape
        noise = [torch.randn(shape[1:], generator=generator("evaluate vae", self.seed, start + i))
                 for i in range(shape[0])]  # fmt: skip
        return posterior.mean + posterior.std * torch.stack(noise).to(posterior.mean)

    def _compare(self, x_u8, y_u8, x, x_hat) -> None:
        if "psnr" in self.sums:
            self.sums["psnr"] += psnr(x_u8, y_u8).sum().item()
        if "ssim" in self.sums:
            pairs = [t.permute(0, 2, 3, 1).cpu().numpy() for t in (x_u8, y_u8)]
            with ThreadPoolExecutor() as pool:
                self.sums["ssim"] += sum(pool.map(ssim, *pairs))
        if "lpips" in self.sums:
            self.sums["lpips"] += self.lpips_net(x_hat, x).double().sum().item()

    def result(self, total: int, ranks: Ranks) -> dict:
        """Means over all images of all ranks."""
        sums = torch.tensor(list(self.sums.values()), dtype=torch.float64, device=ranks.device)
        means = (ranks.sum(sums) / total).tolist()
        values = {name.upper(): mean for name, mean in zip(self.sums, means)}
        self.latents.sums = ranks.sum(self.latents.sums)
        assert round(self.latents.sums[0, 0].item()) == total, (self.latents.sums[0, 0], total)
        return values | (self.latents.result() if "latents" in self.names else {})


def evaluate_vae(
    vae: VAE,
    images: ImageSet,
    options: Options,
    *,
    posterior: str = "mode",
    seed: int = 0,
    lpips_net: torch.nn.Module | None = None,
    net: FeatureNet | None = None,
    ranks: Ranks | None = None,
    progress: Callable[[str], Callable[[int], None]] | None = None,
) -> dict:
    """Reconstruct `images` and measure => a JSON-able record (utils.report), on every rank.

    `options.metrics`: some of `VAE_METRICS`; None = all but lpips, which needs `lpips_net`.
    `posterior`: decode its mode, or a sample drawn from (seed, image index).
    """
    names = choose_vae_metrics(options.metrics)
    ranks = ranks or Ranks(device=net.device if net else None)
    for side in images.size:
        vae.latent_shape(side)
    if "rfid" in names and net is None:
        net = options.load(ranks)
    assert lpips_net is not None or "lpips" not in names
    vae.to(ranks.device).eval()
    lpips_net = lpips_net.to(ranks.device) if lpips_net is not None else None
    run = Reconstruction(vae, names, posterior=posterior, seed=seed, lpips_net=lpips_net)
    shown = progress and progress("images")
    before, after = walk_pairs(run, images, net, ranks, options.batch_size, shown)
    values = run.result(len(images), ranks)
    record = new_record(net, images, ranks.on_main(images.fingerprint), None)
    record["protocol"] = {PROTOCOLS[name][0]: PROTOCOLS[name][1] for name in names}
    record["protocol"] |= {"posterior": posterior, "seed": seed if posterior == "sample" else None}
    return ranks.on_main(partial(_fill, record, names, values, before, after, net))


def choose_vae_metrics(asked: tuple[str, ...] | None) -> list[str]:
    """The metrics asked for, or all that need no further weights."""
    unknown = [name for name in asked or () if name not in VAE_METRICS]
    if unknown:
        raise UserError(
            f"--metrics {unknown[0]} with --vae: expected some of {','.join(VAE_METRICS)}"
        )
    return list(asked or [name for name in VAE_METRICS if name != "lpips"])


def walk_pairs(
    run: Reconstruction,
    images: ImageSet,
    net: FeatureNet | None,
    ranks: Ranks,
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> tuple[Statistics | None, Statistics | None]:
    """One pass: images through the VAE, both through `net` => statistics before and after."""
    collectors: list[Collector] = []
    for x_u8, start, n in walk(images, ranks, batch_size, progress):
        x_u8 = x_u8.to(ranks.device)
        with exact_float32():
            y_u8 = run.add(x_u8, start, n)
        if net is None:
            continue
        for i, pictures in enumerate((x_u8, y_u8)):
            feats = net(pictures)["pool"]
            if len(collectors) == i:
                dim = feats.shape[1]
                halves = i == 0 and not net.published
                collectors.append(
                    Collector(len(images), dim, ranks, keep_rows=False, halves=halves)
                )
            collectors[i].add(feats[:n], start, batch_size)
    return tuple(c.result() for c in collectors) if collectors else (None, None)


def _fill(record, names, values, before, after, net) -> dict:
    """Rank 0: the numbers in the order of `VAE_METRICS`."""
    n = record["n"]
    if "rfid" in names:
        name = metric_name("rfid", net, n)
        add_distance(record, name, frechet(before, after), before, after)
    record["metrics"] |= values
    judge(record, net, from_file=True)
    return record
