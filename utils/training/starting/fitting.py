"""Whether a checkpoint has the shapes that its run, or a new one, needs. Headers alone are read."""

from pathlib import Path

import torch
import torch.nn as nn

from models.checks.errors import UserError
from models.sit import SiT, empty_sit, read_sit_config
from models.vae import VAE, build_vae
from models.weights.configs import WEIGHTS
from models.weights.headers import read_shapes
from models.weights.loading import require_match
from utils.checkpoint import DISCRIMINATOR, OPTIMIZERS, SIT, SIT_EMA, VAE_FOLDER
from utils.config.schema import Config
from utils.sealed import STATE, find_fault


def require_fit(checkpoint: Path, sit: SiT, vae: VAE, disc: nn.Module | None) -> None:
    """The networks of a checkpoint have the shapes of these, and what else a run that goes on needs
    is there. Reads headers alone."""
    parts: list[tuple[str, nn.Module]]
    parts = [(f"{name}/{WEIGHTS}", sit) for name in (SIT, SIT_EMA)]
    parts.append((f"{VAE_FOLDER}/{WEIGHTS}", vae.net))
    if disc:
        if not (checkpoint / DISCRIMINATOR).is_file():
            raise UserError(
                f"{checkpoint} has no discriminator: set loss.reg.gan=0, or a new run.name"
            )
        parts.append((DISCRIMINATOR, disc))
    if not (checkpoint / OPTIMIZERS).is_file():
        raise UserError(
            f"{checkpoint} holds no optimizers (imported?): use run.init_from={checkpoint}"
        )
    for name, net in parts:
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{path} not found: {checkpoint} is no whole checkpoint; name another")
        try:
            require_match(net.state_dict(), read_shapes(path), path, "this config")
        except UserError as error:
            raise UserError(f"{error}; correct the config, or choose another run.name") from None


def require_same_vae(c: Config, origin: Path) -> None:
    """The VAE of `run.init_from` has the shapes of the one that vae.name names."""
    path = origin / VAE_FOLDER / WEIGHTS
    shapes = read_shapes(path)
    with torch.device("meta"):
        vae = build_vae(c.vae.name)
    try:
        require_match(vae.net.state_dict(), shapes, path, f"vae.name={c.vae.name}")
    except UserError as error:
        raise UserError(
            f"{error}; with run.init_from the VAE is that of the checkpoint: leave vae.name out, "
            f"or set vae.name={origin / VAE_FOLDER}"
        ) from None


def require_whole(folder: Path, read_all: bool = True) -> None:
    """`UserError` unless the SiT and its moving average are there, and are the same network, with
    the tensors that their config.json describes. Of weights, headers are read; and all bytes to
    compare their hashes, if there is a state.json, but for `read_all=False`."""
    if (folder / STATE).is_file() and (fault := find_fault(folder, read_all)):
        raise UserError(f"run.init_from={folder} is not a whole checkpoint: {fault}; name another")
    configs = []
    for name in (SIT, SIT_EMA):
        path = folder / name / WEIGHTS
        if not path.is_file():
            raise UserError(f"{path} not found: {folder} is no whole checkpoint; name another")
        configs.append(read_sit_config(folder / name))
        expected = empty_sit(folder / name).state_dict()
        require_match(expected, read_shapes(path), path, "its config.json")
    if configs[0] != configs[1]:
        differing = [name for name in configs[0] if configs[0][name] != configs[1][name]]
        raise UserError(
            f"{folder}: {SIT}/ and {SIT_EMA}/ are different networks ({', '.join(differing)} in "
            "their config.json): name another checkpoint"
        )
