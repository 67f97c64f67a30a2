"""Images per second that a SiT and a VAE make, from noise to pixels in the memory of the host."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from models.vae import build_vae
from utils.benchmark import machine
from utils.benchmark.clock import spread
from utils.config.schema import Config
from utils.distributed import Ranks
from utils.sampling.images import draw_images
from utils.sampling.load import load_networks, open_checkpoint, prepare_networks, settings_for
from utils.sampling.locate import locate_checkpoint
from utils.sampling.settings import SamplingSettings
from utils.training.networks import build_sit

NUM_CLASSES = 1000  # where the config does not say


def measure_sampling(
    config: Config,
    settings: SamplingSettings,
    steps: int,
    warmup: int,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Time `steps` batches of images after `warmup` others, on every rank at once; of the networks
    of a checkpoint, or of those of the config with random weights. The medians are of this rank."""
    ranks = Ranks()
    settings = settings_for(ranks.device, settings)
    if checkpoint:
        given = checkpoint
        checkpoint = ranks.on_main(lambda: locate_checkpoint(given))
        settings = open_checkpoint(checkpoint, settings).settings
        sit, vae = load_networks(checkpoint, settings, ranks.device)
    else:
        settings = replace(settings, path=settings.path or config.loss.diffusion.path)
        vae = build_vae(config.vae.name)
        sit = build_sit(config, vae, config.data.num_classes or NUM_CLASSES, ())
        sit, vae = prepare_networks(sit, vae, settings, ranks.device)
    size, seconds = settings.batch_size, []
    for number in range(warmup + steps):
        if number == warmup:
            ranks.wait()
            machine.forget_peak(ranks.device)
        first = (number * ranks.world + ranks.rank) * size
        start = time.perf_counter()
        draw_images(settings, sit, vae, range(first, first + size), ranks.device)
        machine.synchronize(ranks.device)
        seconds.append(time.perf_counter() - start)
    batch = spread([1000 * value for value in seconds[warmup:]])
    rate = 1000 * size / batch["median"]
    return {
        "mode": "sampling",
        "ranks": ranks.world,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "steps": steps,
        "warmup_steps": warmup,
        "images_per_second": rate,
        "images_per_second_all_ranks": machine.total(ranks, rate),
        "batch_ms": batch,
        **machine.peak_memory(ranks.device),
        "sampling": asdict(settings),
    }
