"""What a new run takes over from a checkpoint (`run.init_from`), and what is new in its networks.

VAE, blocks, patches, time embedding, last layer and latent norm are carried over as they are: a SiT
that differs in them is another network, and is refused. The parts in `INIT_NEW` are carried over as
far as they fit, and may be new if `run.init_new` names them. New numbers are those of a new run
with the same seed, the same in the SiT and in its moving average.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from models.checks.errors import UserError
from models.sit import SiT
from models.weights.configs import WEIGHTS
from models.weights.headers import read_shapes
from models.weights.loading import load_strictly, require_match
from models.weights.reading import read_state
from utils.checkpoint import DISCRIMINATOR
from utils.config.fields import INIT_NEW
from utils.config.schema import Config
from utils.training.starting.learned import Learned, read_learned
from utils.training.starting.parts import (
    Part,
    compare_classes,
    compare_positions,
    compare_projectors,
    resize_positions,
)

LABELS, POSITIONS, PROJECTORS = "y_embedder.embedding_table.weight", "pos_embed", "projectors."
# what makes another network, and the setting of each; "" = none
STRUCTURE = {
    **{"hidden_size": "sit.hidden_size", "depth": "sit.depth", "num_heads": "sit.num_heads"},
    **{
        "patch_size": "sit.patch_size",
        "qk_norm": "sit.qk_norm",
        "mlp_ratio": "",
        "in_channels": "",
    },
}


SAID = {"carried over": "carried", "left out": "left_out", "new": "new"}


@dataclass
class Inheritance:
    """`parts`: what becomes of each of `INIT_NEW`; `notes`: what a user should know."""

    learned: Learned
    parts: dict[str, Part]
    notes: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """What is carried over, left out and new: a line for each part."""
        sit = self.learned.sit
        lines = [f"carried over: VAE, latent norm, SiT of {sit['depth']} blocks of width "
                 f"{sit['hidden_size']}, its EMA"]  # fmt: skip
        for said, attribute in SAID.items():
            found = {name: getattr(part, attribute) for name, part in self.parts.items()}
            lines += [f"{said}: {name}: {text}" for name, text in found.items() if text]
        return lines

    @property
    def sit_changes(self) -> bool:
        """Whether the SiT of the run is not tensor by tensor that of the checkpoint."""
        return any(part.changes for name, part in self.parts.items() if name != "disc")

    def load_sit(self, sit: SiT, name: str) -> None:
        """Give `sit`, which has the numbers of a new run, whatever is carried over from `name` (SIT
        or SIT_EMA)."""
        path = self.learned.folder / name / WEIGHTS
        state = self.carry_over(read_state(path), sit.state_dict())
        load_strictly(sit, state, path, "the SiT of this config")

    def carry_over(
        self, state: Mapping[str, Tensor], fresh: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """State dicts of the checkpoint's SiT and of a new one => that of the run, on the CPU."""
        found = {name: value for name, value in state.items() if not name.startswith(PROJECTORS)}
        found[LABELS] = _rows(state[LABELS], fresh[LABELS], self.parts["classes"].taken)
        if self.parts["pos_embed"].new:
            grid = round(fresh[POSITIONS].shape[1] ** 0.5)
            found[POSITIONS] = resize_positions(state[POSITIONS], grid)
        for number, old in enumerate(self.parts["projectors"].taken):
            origin, own = (fresh, number) if old is None else (state, old)
            found |= _renumbered(origin, f"{PROJECTORS}{own}.", f"{PROJECTORS}{number}.")
        return found


def inherit(
    c: Config, folder: Path, sit: SiT, disc: nn.Module | None, classes: Sequence[str] | None
) -> Inheritance:
    """What the networks `sit` and `disc` of a new run take from the checkpoint `folder`; without
    reading its weights. `classes`: names of the data's, None = not known yet. `UserError` for
    another network, and for a new part that `run.init_new` does not name."""
    old, asked = read_learned(c, folder), c.run.init_new
    _require_same_structure(old, sit)
    encoders = c.encoder.names if c.uses_encoder else []
    parts = {
        "projectors": compare_projectors(old, sit.config, encoders, "projectors" in asked),
        "classes": compare_classes(old, sit.config, classes, "classes" in asked),
        "pos_embed": compare_positions(old, sit.grid),
    }
    if disc:
        parts["disc"] = compare_disc(folder, disc, c.disc.weights)
    _require_named(parts, c, folder)
    found = Inheritance(old, parts, [part.doubt for part in parts.values() if part.doubt])
    for name in asked:
        if name not in parts or not parts[name].new:
            found.notes.append(f"run.init_new names {name}, of which nothing is new")
    if old.path not in (None, c.loss.diffusion.path):
        found.notes.append(
            f"{folder} learned on the path {old.path}: loss.diffusion.path={c.loss.diffusion.path} "
            "is another one"
        )
    if old.predicts:
        found.notes.append(f"{folder} was imported from a DiT: it has learned to predict noise, at "
                           "times of 0 to 999, and has to learn velocity")  # fmt: skip
    return found


def _require_same_structure(old: Learned, sit: SiT) -> None:
    other = [name for name in STRUCTURE if old.sit[name] != sit.config[name]]
    if not other:
        return
    has = ", ".join(f"{name}={old.sit[name]}" for name in other)
    wanted = ", ".join(str(sit.config[name]) for name in other)
    words = [f"{STRUCTURE[name]}={_text(old.sit[name])}" for name in other if STRUCTURE[name]]
    remedy = f"set {' '.join(words)}" if len(words) == len(other) else "name another checkpoint"
    raise UserError(
        f"run.init_from={old.folder} holds a SiT of {has}, that of this run has {wanted}: {remedy}"
    )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _require_named(parts: Mapping[str, Part], c: Config, folder: Path) -> None:
    """A discriminator need not be named where the checkpoint has none that would be lost."""
    new = [n for n, part in parts.items() if part.new and (n != "disc" or part.left_out)]
    if missing := [name for name in new if name not in c.run.init_new]:
        names = [name for name in INIT_NEW if name in (*missing, *c.run.init_new)]
        lacks = "; ".join(f"{name}: {parts[name].new}" for name in missing)
        raise UserError(
            f"run.init_from={folder} does not hold all that this run needs ({lacks}): to begin "
            f"with these as new ones, set run.init_new=[{','.join(names)}]"
        )


def compare_disc(folder: Path, disc: nn.Module, weights: str | None) -> Part:
    """The discriminator: that of the file `weights`, else that of the checkpoint if it has one of
    this shape, else a random one."""
    path = folder / DISCRIMINATOR
    if not path.is_file():
        return Part() if weights else Part(new="random, as the checkpoint has none")
    if weights:
        return Part(left_out=f"that of the checkpoint, in favour of {weights}")
    shapes = read_shapes(path)
    try:
        require_match(disc.state_dict(), shapes, path, "this config")
    except UserError:
        new = "random, as that of the checkpoint has another shape"
        return Part(new=new, left_out="that of the checkpoint")
    return Part(carried="whole")


def _rows(old: Tensor, fresh: Tensor, taken: Sequence[int | None]) -> Tensor:
    """A table with the rows `taken` of `old`, and those of `fresh` for None."""
    table = fresh.cpu().clone()
    kept = [i for i, row in enumerate(taken) if row is not None]
    table[kept] = old[[row for row in taken if row is not None]].to(table.dtype)
    return table


def _renumbered(state: Mapping[str, Tensor], prefix: str, other: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, with `other` in its place, on the CPU."""
    return {
        other + name.removeprefix(prefix): value.cpu()
        for name, value in state.items()
        if name.startswith(prefix)
    }
