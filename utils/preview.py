"""Pictures during training: EMA samples from noises that never change, and reconstructions."""

import torch
from accelerate import Accelerator

from utils.build import Nets
from utils.config import Config
from utils.data import Source
from utils.draws import generator
from utils.images import pm1_to_u8, save_grid, u8_to_pm1
from utils.samplers import sample

COLUMNS = 8


class Previewer:
    """Writes samples/STEP.png and samples/STEP-reconstructions.png on the main process."""

    def __init__(self, config: Config, source: Source, accelerator: Accelerator):
        self.config, self.source, self.accelerator = config, source, accelerator

    def is_due(self, step: int, last: bool) -> bool:
        every = self.config.preview.every
        return every > 0 and (last or step % every == 0)

    def write(self, nets: Nets, step: int) -> None:
        if self.accelerator.is_main_process:
            folder = self.config.run_dir / "samples"
            scale = max(1, 64 // self.config.data.resolution)
            save_grid(folder / f"{step:07d}.png", self.draw_samples(nets), COLUMNS, scale)
            pairs = self.reconstruct(nets)
            save_grid(folder / f"{step:07d}-reconstructions.png", pairs, COLUMNS, scale)

    @torch.no_grad()
    def draw_samples(self, nets: Nets) -> torch.Tensor:
        """(N, 3, H, W) uint8 of the EMA weights; the labels run through the classes in order."""
        p, device = self.config.preview, self.accelerator.device
        shape = (p.num, *nets.vae.latent_shape(self.config.data.resolution))
        noise = torch.randn(shape, generator=generator("preview", self.config.run.seed))
        y = torch.arange(p.num, device=device) % self.source.num_classes
        images = []
        for chunk, labels in zip(noise.to(device).split(16), y.split(16)):
            with nets.autocast():
                z_n = sample(
                    nets.ema,
                    chunk,
                    labels,
                    solver=p.solver,
                    steps=p.steps,
                    cfg_scale=p.cfg_scale,
                    path=self.config.loss.diffusion.path,
                    generator=generator("preview sde", self.config.run.seed, len(images)),
                )
                images.append(pm1_to_u8(nets.vae.decode(nets.ema.denormalize(z_n))))
        return torch.cat(images)

    @torch.no_grad()
    def reconstruct(self, nets: Nets) -> torch.Tensor:
        """(4 * COLUMNS, 3, H, W) uint8: a row of images, one of their reconstructions; twice."""
        total = len(self.source)
        rows = []
        for start in (0, COLUMNS):
            indices = [(start + i) * total // (2 * COLUMNS) for i in range(COLUMNS)]
            x_u8 = torch.stack([self.source[i][0] for i in indices]).to(self.accelerator.device)
            with nets.autocast():
                x_hat = nets.vae.decode(nets.vae.encode(u8_to_pm1(x_u8)).mean)
            rows += [x_u8, pm1_to_u8(x_hat)]
        return torch.cat(rows)
