"""The adversarial losses: the VAE's side, the discriminator's side, and LeCam regularisation.

Hinge GAN as in taming transformers (arXiv 2012.09841). Logits may have any shape, one number for
each patch that is judged; a high one means "real". Each loss is an unweighted scalar, in float32 or
more.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.layers.autocast import at_least_float32


def generator_loss(logits_fake: torch.Tensor) -> torch.Tensor:
    """The VAE's side: raise the logits of reconstructions."""
    return -at_least_float32(logits_fake).mean()


def discriminator_terms(
    logits_real: torch.Tensor, logits_fake: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The discriminator's side => its loss terms by the names under which they are logged.

    hinge: push the logits of real images above 1 and those of reconstructions below -1.
    """
    real, fake = at_least_float32(logits_real), at_least_float32(logits_fake)
    return {"hinge": 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())}


class LeCam(nn.Module):
    """LeCam regularisation of the discriminator (arXiv 2104.03310, Eq. 5, one-sided as in its
    authors' code): keep the logits of each side near the moving average of the other side's.

    The two averages, `real` and `fake`, are buffers, so that a checkpoint holds them.
    """

    real: torch.Tensor
    fake: torch.Tensor

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
        """Logits of real images and of reconstructions => scalar."""
        above = F.relu(at_least_float32(logits_real) - self.fake).square().mean()
        below = F.relu(self.real - at_least_float32(logits_fake)).square().mean()
        return above + below

    def update(self, mean_real: torch.Tensor, mean_fake: torch.Tensor) -> None:
        """Move the averages by the mean logits of the whole batch; to be called once a step."""
        self.real.lerp_(mean_real, 1 - self.decay)
        self.fake.lerp_(mean_fake, 1 - self.decay)
