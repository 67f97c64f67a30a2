"""The checkpoint of `run.init_from`: what its SiT is, and what its run has recorded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from models.backbones.names import canonical
from models.backbones.table import ENCODERS
from models.sit import read_sit_config
from models.weights.configs import WEIGHTS
from utils.checkpoint import SIT
from utils.config.load import recorded_config
from utils.config.schema import Config
from utils.sealed import STATE, CheckpointState, read_state_json


@dataclass(frozen=True)
class Learned:
    """The SiT of a checkpoint, and what its run has recorded; None = not known, as of an import.

    sit       arguments of its SiT
    classes   names of its classes, by label
    encoders  short names of the encoders that its projectors belong to, in their order
    path      interpolant between data and noise
    predicts  "noise" for an imported DiT; "" = velocity
    """

    folder: Path
    sit: dict[str, Any]
    classes: list[str] | None = None
    encoders: list[str] | None = None
    path: str | None = None
    predicts: str = ""

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.sit["input_size"] // self.sit["patch_size"]

    @property
    def has_null(self) -> bool:
        """Whether the last row of its label table is a null label."""
        return self.sit["class_dropout_prob"] > 0

    def positions(self) -> Tensor:
        """The position table of the raw SiT, (1, T, D)."""
        with safe_open(self.folder / SIT / WEIGHTS, "pt") as file:
            return file.get_tensor("pos_embed")


def read_learned(c: Config, folder: Path) -> Learned:
    """What `folder` says of itself; `UserError` if it cannot be read."""
    sit = read_sit_config(folder / SIT)
    if not (folder / STATE).is_file():
        return Learned(folder, sit)
    state, recorded = read_state_json(folder), recorded_config(folder, c)
    encoders = recorded.encoder.names if recorded and recorded.uses_encoder else _imported(state)
    encoders = encoders if len(encoders) == len(sit["encoder_dims"]) else None
    classes = state.classes if len(state.classes or ()) == sit["num_classes"] else None
    predicts = (state.source or {}).get("predicts", "")
    return Learned(folder, sit, classes, encoders, state.path, predicts)


def _imported(state: CheckpointState) -> list[str]:
    """The encoders that REPA's settings, kept at an import, name as `enc_type`, with commas between
    them; [] if that is not said, or is no name of ours."""
    args = (state.source or {}).get("args")
    named = args.get("enc_type") if isinstance(args, dict) else None
    names = [canonical(name) for name in str(named or "").split(",")]
    return names if all(name in ENCODERS for name in names) else []
