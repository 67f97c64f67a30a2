"""SiT: the scalable interpolant transformer (arXiv 2401.08740), with projectors and latent norm.

DiT blocks (arXiv 2212.09748) with adaLN-zero. The network knows nothing of noise, paths or losses,
and draws nothing at random: dropped labels arrive as the null label. State-dict keys are those of
the published REPA-E checkpoints.

N batch, C latent channels, h w latent grid, p patch, T = (h/p)(w/p) tokens, D width.
x_t noised normalised latent, t time in [0, 1] (0 = data, 1 = noise), y label, v velocity.
"""

import inspect
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from models.checks.errors import UserError, short, shown
from models.latent_norm import LatentNorm
from models.layers.autocast import LayerNorm, add_gated, at_least_float32, half_weights, modulate
from models.projector import build_projector
from models.weights.configs import CONFIG, WEIGHTS, arguments_for, read_config
from models.weights.loading import load_strictly
from models.weights.reading import read_state


class PatchEmbed(nn.Module):
    """(N, C, h, w) => (N, T, D), row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """(N,) => (N, D): 128 cosines and 128 sines of t itself (not of 1000 t), then an MLP."""

    def __init__(self, hidden_size: int, frequencies: int = 256, max_period: float = 10000.0):
        super().__init__()
        self.frequencies, self.max_period = frequencies, max_period
        self.mlp: Any = nn.Sequential(
            nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = self.frequencies // 2
        k = torch.arange(half, device=t.device, dtype=torch.float32)
        angles = t.float()[:, None] * torch.exp(-math.log(self.max_period) / half * k)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """(N,) int64 => (N, D). The last row is the null label of classifier-free guidance, if any."""

    def __init__(self, num_classes: int, hidden_size: int, null_row: bool):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_row, hidden_size)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """(N, T, D) => (N, T, D), multi-head self-attention with optional QK-norm."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool):
        super().__init__()
        assert hidden_size % num_heads == 0, (hidden_size, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        head_dim = hidden_size // num_heads
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(h).unflatten(2, (3, self.num_heads, -1))  # (N, T, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        h = F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, D/heads)
        return self.proj(h.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """(N, T, D) => (N, T, D), tanh-GELU."""

    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class Block(nn.Module):
    """adaLN-zero block, (N, T, D) and c (N, D) => (N, T, D): attention and MLP, each with scale,
    shift and gate computed from the condition c."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__()
        self.norm1 = LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        with half_weights(self, h):
            modulation = at_least_float32(self.adaLN_modulation(c)).chunk(6, dim=1)
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
            h = add_gated(h, gate_a, self.attn(modulate(self.norm1(h), shift_a, scale_a)))
            return add_gated(h, gate_m, self.mlp(modulate(self.norm2(h), shift_m, scale_m)))


class FinalLayer(nn.Module):
    """(N, T, D) and c (N, D) => (N, T, p * p * C)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = at_least_float32(self.adaLN_modulation(c)).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(h), shift, scale))


class SiT(ModelMixin, ConfigMixin):
    """Velocity network v(x_t, t, y), its alignment heads, and the norm of the latents it lives in.

    `encoder_dims`: one projector for each aligned encoder, () for none. `align_depth`: the block
    (1-based) whose output is projected. `latent_norm`: "batch" (REPA-E: batch statistics in train
    mode) or "fixed" (constants, for a frozen VAE). `class_dropout_prob=0` builds no null label.
    """

    config: Any  # diffusers gives each argument of __init__ as an attribute
    pos_embed: torch.Tensor  # (1, T, D)
    _gradient_checkpointing_func: Any  # set by enable_gradient_checkpointing
    _supports_gradient_checkpointing = True
    # of diffusers' from_pretrained with a torch_dtype: autocast computes these in float32 as well
    _keep_in_fp32_modules: ClassVar = ["bn", "y_embedder", "q_norm", "k_norm"]

    @register_to_config
    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        encoder_dims: tuple[int, ...] = (768,),
        align_depth: int = 8,
        projector: str = "mlp",
        qk_norm: bool = False,
        mlp_ratio: float = 4.0,
        projector_dim: int = 2048,
        latent_norm: str = "batch",
    ):
        super().__init__()
        assert input_size % patch_size == 0, (input_size, patch_size)
        assert 1 <= align_depth <= depth or not encoder_dims, (align_depth, depth)
        self.grid = input_size // patch_size
        self.gradient_checkpointing = False
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob > 0)
        # A buffer: never trained, yet part of the state dict, because published checkpoints carry
        # one that was trained by accident and belongs to their weights.
        self.register_buffer("pos_embed", sincos_pos_embed(hidden_size, self.grid)[None])
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth)
        )
        self.projectors = nn.ModuleList(
            build_projector(projector, hidden_size, dim, projector_dim) for dim in encoder_dims
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.bn = LatentNorm(in_channels, fixed=latent_norm == "fixed")
        self.initialize()

    @property
    def null_label(self) -> int | None:
        """The label that means "no class" in classifier-free guidance; None if there is none."""
        return self.config.num_classes if self.config.class_dropout_prob > 0 else None

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor, stop_at_align: bool = False
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """x_t (N, C, h, w), t (N,), y (N,) int64
        => velocity v (N, C, h, w), and the tokens projected for each encoder, [(N, T, D_enc), ...].

        With `stop_at_align` only blocks 1..align_depth and the projectors run, and v is None.
        """
        h = self.x_embedder(x_t)
        h = h + self.pos_embed.to(h.dtype)  # (N, T, D), in half precision under autocast
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        projected = []
        for number, block in enumerate(self.blocks, start=1):
            h = self._run_block(block, h, c)  # (N, T, D)
            if number == self.config.align_depth:
                projected = [projector(h) for projector in self.projectors]
                if stop_at_align:
                    return None, projected
        return self.unpatchify(self.final_layer(h, c)), projected

    def normalize(self, z: torch.Tensor) -> torch.Tensor:
        """Latent => normalised latent, (N, C, h, w); by batch statistics in train mode."""
        return self.bn(z)

    def denormalize(self, z_n: torch.Tensor) -> torch.Tensor:
        """Normalised latent => latent, (N, C, h, w), by the running statistics."""
        return self.bn.inverse(z_n)

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """(N, T, p * p * C) => (N, C, h, w); inside a patch: row, column, channel."""
        p, c, g = self.config.patch_size, self.config.in_channels, self.grid
        x = patches.unflatten(2, (p, p, c)).unflatten(1, (g, g))  # (N, g, g, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _run_block(self, block: nn.Module, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, h, c)
        return block(h, c)

    def initialize(self) -> None:
        """DiT's initialisation: the output is zero, and so is what every block adds."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch: Any = self.x_embedder.proj  # as a linear layer on the flattened patch
        nn.init.xavier_uniform_(patch.weight.flatten(1))
        nn.init.zeros_(patch.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        parts = [m for m in self.modules() if isinstance(m, Block | FinalLayer)]
        layers: list[Any] = [part.adaLN_modulation[1] for part in parts]
        for layer in (*layers, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def load_sit(folder: Path) -> SiT:
    """The SiT of a folder that `save_pretrained` wrote, in eval mode, on the CPU.

    Each tensor is held in memory once. Raises `UserError` for a folder that is absent or damaged,
    and for missing, unexpected or misshapen tensors (`SiT.from_pretrained` would make them random).
    """
    sit = empty_sit(folder)
    load_strictly(sit, read_state(folder / WEIGHTS), folder, "its config.json")
    if (sit.bn.running_var < 0).any():
        raise UserError(f"weights of {folder}: a variance in bn.running_var is negative")
    return sit.eval()


def empty_sit(folder: Path) -> SiT:
    """The SiT that the config.json of a folder describes, on the meta device: shapes without
    numbers. `UserError` as for `read_sit_config`."""
    config = read_sit_config(folder)
    try:
        with torch.device("meta"):
            return SiT(**config)
    # sizes that do not go together, e.g. heads that do not divide the width
    except (ArithmeticError, AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"config of {folder} describes no SiT ({short(error)})") from None


def read_sit_config(folder: Path) -> dict[str, Any]:
    """The arguments of `SiT` in the config.json of a folder that `save_pretrained` wrote;
    `UserError` if one is missing or of a wrong type or range."""
    config = read_config(folder / CONFIG)
    if config.get("_class_name") != "SiT":
        raise UserError(f"{folder} holds a {shown(config.get('_class_name'))}, expected a SiT")
    found = arguments_for(SiT, config, folder)
    missing = sorted(inspect.signature(SiT).parameters.keys() - found.keys())
    if missing:
        raise UserError(f"config of {folder} does not say {', '.join(missing)}: copy it again")
    if found["class_dropout_prob"] >= 1:
        given = found["class_dropout_prob"]
        raise UserError(f"config of {folder}: class_dropout_prob={given}, expected less than 1")
    for name, known in {"projector": ("mlp", "conv"), "latent_norm": ("batch", "fixed")}.items():
        if found[name] not in known:
            raise UserError(f"config of {folder}: {name}={found[name]}, expected one of {known}")
    return found


def sincos_pos_embed(dim: int, grid: int) -> torch.Tensor:
    """(grid * grid, D) float32, row by row: the first half of D encodes the column, the second the
    row (the order of MAE and DiT); in each, sines then cosines of D/4 frequencies."""
    assert dim % 4 == 0, dim
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # (grid, D/4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D/2)
    column, row = line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)
    return torch.cat([column, row], dim=1).float()
