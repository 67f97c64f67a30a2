"""What is exchanged in a diffusers AutoencoderKL, so that it is fast and exact under autocast.

Only classes are: parameters, their names and the config stay, and without autocast so do the
numbers.
"""

from typing import Any, cast

import torch.nn as nn
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from models.layers.autocast import half_weights, leave_autocast
from models.layers.group_norm import GroupNorm, GroupNormSiLU


class ResnetBlock(ResnetBlock2D):
    """The block as these autoencoders have it: no time, no resampling inside, no division by a
    scale of 1."""

    def forward(self, input_tensor: Tensor, temb: None = None, *args: Any) -> Tensor:
        with half_weights(self, input_tensor):
            h = self.conv1(self.norm1(input_tensor))
            h = self.conv2(self.dropout(self.norm2(h)))
            skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
            return skip + h


def prepare(net: Any) -> None:
    """Exchange the layers of an `AutoencoderKL`, in place.

    Norms take and give half precision, with SiLU where one follows. The convolutions whose outputs
    are moments, latents or images leave autocast: in bfloat16, latents of deviation 5 lie on steps
    of 0.03, and pixels on steps of up to one grey level, which a discriminator can tell from real
    images. Attention logits are safe: torch's kernels keep them in float32.
    """
    module: Any
    for module in net.modules():
        if isinstance(module, ResnetBlock2D) and _is_plain(module):
            module.__class__ = ResnetBlock
            _exchange_norms(module, "norm1", "norm2")
        elif hasattr(module, "conv_norm_out"):  # the encoder and the decoder
            _exchange_norms(module, "conv_norm_out")
            module.conv_act = nn.Identity()
            leave_autocast(cast(Any, module.conv_out))
    for module in net.modules():  # what is left is in the attention
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm
    leave_autocast(net.quant_conv)
    leave_autocast(net.post_quant_conv)


def _is_plain(block: Any) -> bool:
    return (
        block.time_emb_proj is None
        and block.upsample is None
        and block.downsample is None
        and block.output_scale_factor == 1
        and isinstance(block.nonlinearity, nn.SiLU)
        and type(block.norm1) is type(block.norm2) is nn.GroupNorm
    )


def _exchange_norms(module: Any, *names: str) -> None:
    for name in names:
        getattr(module, name).__class__ = GroupNormSiLU
