"""Files in the layouts that other people publish, and a SiT that is independent of ours.

The layouts are written from the published key names, without any code of `utils.published`. The
SiT of `velocity` works on a plain dict of tensors, from the published key names and equations.
"""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.models.test_vae import F8D4, CompVisVAE

CLASSES, WIDTH, HEADS, DEPTH, PATCH, SIDE = 5, 48, 3, 3, 2, 4  # 32 px, 2x2 tokens
MEAN, VAR = [0.3, -0.2, 0.1, 0.0], [0.5, 2.0, 1.0, 0.25]


def sit_state(seed: int, channels=4, out=4, projectors=True, bn=True, qk_norm=False) -> dict:
    """Random weights under published names; pos_embed is "learned": nothing like sin-cos."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, std=0.15):
        return torch.randn(shape, generator=g) * std

    state = {"pos_embed": draw(1, (SIDE // PATCH) ** 2, WIDTH, std=0.5)}

    def linear(name, n_in, n_out):
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(n_out, n_in), draw(n_out)

    state["x_embedder.proj.weight"] = draw(WIDTH, channels, PATCH, PATCH)
    state["x_embedder.proj.bias"] = draw(WIDTH)
    linear("t_embedder.mlp.0", 256, WIDTH)
    linear("t_embedder.mlp.2", WIDTH, WIDTH)
    state["y_embedder.embedding_table.weight"] = draw(CLASSES + 1, WIDTH, std=0.5)
    for i in range(DEPTH):
        linear(f"blocks.{i}.attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"blocks.{i}.attn.proj", WIDTH, WIDTH)
        linear(f"blocks.{i}.mlp.fc1", WIDTH, 4 * WIDTH)
        linear(f"blocks.{i}.mlp.fc2", 4 * WIDTH, WIDTH)
        linear(f"blocks.{i}.adaLN_modulation.1", WIDTH, 6 * WIDTH)
        for name in ("q_norm", "k_norm") if qk_norm else ():
            state[f"blocks.{i}.attn.{name}.weight"] = 1 + draw(WIDTH // HEADS)
            state[f"blocks.{i}.attn.{name}.bias"] = draw(WIDTH // HEADS)
    linear("final_layer.linear", WIDTH, PATCH * PATCH * out)
    linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    if projectors:
        for j, (n_in, n_out) in {0: (WIDTH, 24), 2: (24, 24), 4: (24, 16)}.items():
            linear(f"projectors.0.{j}", n_in, n_out)
    if bn:
        state["bn.running_mean"] = torch.tensor(MEAN)
        state["bn.running_var"] = torch.tensor(VAR) * (1 + seed / 10)
        state["bn.num_batches_tracked"] = torch.tensor(400_000 + seed)
    return state


def original_sit_state(seed: int, **kwargs) -> dict:
    """The same without a trace of REPA: taken for a file of the original SiT release."""
    return sit_state(seed, projectors=False, bn=False, **kwargs)


def first_release(state: dict, aligned: int = 2) -> dict:
    """The same as REPA first released it: the blocks behind the aligned one stand in
    `decoder_blocks`, counted from 0."""

    def rename(key: str) -> str:
        parts = key.split(".")
        if parts[0] != "blocks" or int(parts[1]) < aligned:
            return key
        return ".".join(["decoder_blocks", str(int(parts[1]) - aligned), *parts[2:]])

    return {rename(key): value for key, value in state.items()}


def compvis_vae(seed: int = 3) -> CompVisVAE:
    torch.manual_seed(seed)
    return CompVisVAE(**F8D4).eval()


def disc_state() -> dict:
    """The pix2pix discriminator as latent-diffusion stores it."""
    state, width = {"main.0.weight": torch.randn(8, 3, 4, 4), "main.0.bias": torch.randn(8)}, 8
    for n, i in enumerate((2, 5, 8), start=1):
        wider = 8 * 2**n
        state[f"main.{i}.weight"] = torch.randn(wider, width, 4, 4)
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"main.{i + 1}.{name}"] = torch.rand(wider)
        state[f"main.{i + 1}.num_batches_tracked"] = torch.tensor(7)
        width = wider
    return state | {"main.11.weight": torch.randn(1, width, 4, 4), "main.11.bias": torch.randn(1)}


def namespace(**changes) -> argparse.Namespace:
    known = {"model": "SiT-XL/2", "num_classes": CLASSES, "encoder_depth": 2, "cfg_prob": 0.1}
    known |= {"path_type": "linear", "prediction": "v", "enc_type": "dinov2-vit-b"}
    return argparse.Namespace(**(known | {"report_to": None, "num_heads": HEADS} | changes))


def optimizer_state() -> dict:
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def joint_checkpoint(path: Path, **changes) -> Path:
    """A training checkpoint of REPA-E; a change to None leaves the entry out."""
    content = {
        "model": {f"module.{k}": v for k, v in sit_state(1).items()},
        "ema": sit_state(2),
        "vae": {f"_orig_mod.{k}": v for k, v in compvis_vae().state_dict().items()},
        "discriminator": disc_state(),
        **{name: optimizer_state() for name in ("opt", "opt_vae", "opt_disc")},
        "args": namespace(),
        "steps": 400_000,
    }
    torch.save({k: v for k, v in (content | changes).items() if v is not None}, path)
    return path


def stats_file(path: Path, mean=tuple(MEAN), var=tuple(VAR)) -> Path:
    view = (1, len(mean), 1, 1)
    scale = torch.tensor(var).rsqrt().view(view)
    torch.save({"latents_scale": scale, "latents_bias": torch.tensor(mean).view(view)}, path)
    return path


class Bomb:
    """Unpickling it creates the file `target`."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def velocity(w: dict, x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
    """The SiT on a dict of tensors: all that its output layer predicts."""

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (
            h.var(-1, keepdim=True, correction=0) + 1e-6
        ) ** 0.5

    freqs = torch.tensor([10000 ** (-k / 128) for k in range(128)], dtype=x.dtype)
    emb = torch.cat([(t * freqs).cos(), (t * freqs).sin()])[None]
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", emb)))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH)
    h = h.flatten(2).mT + w["pos_embed"]
    for i in range(DEPTH):
        mods = linear(f"blocks.{i}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        q, k, v = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + mods[1]) + mods[0]).chunk(3, -1)
        q, k, v = (a.unflatten(2, (HEADS, -1)).transpose(1, 2) for a in (q, k, v))
        if f"blocks.{i}.attn.q_norm.weight" in w:
            name = f"blocks.{i}.attn."
            shape = q.shape[-1:]
            q = F.layer_norm(q, shape, w[name + "q_norm.weight"], w[name + "q_norm.bias"])
            k = F.layer_norm(k, shape, w[name + "k_norm.weight"], w[name + "k_norm.bias"])
        a = ((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        h = h + mods[2] * linear(f"blocks.{i}.attn.proj", a.transpose(1, 2).flatten(2))
        m = linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + mods[4]) + mods[3])
        h = h + mods[5] * linear(f"blocks.{i}.mlp.fc2", F.gelu(m, approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    grid = SIDE // PATCH
    h = h.reshape(len(x), grid, grid, PATCH, PATCH, -1)
    return torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), -1, SIDE, SIDE)
