"""Parts of a SiT that a new run may need anew: which of a checkpoint's numbers still have a place.

Each part is compared by what is known of both runs. Where that does not decide (classes or encoders
without names, but of the same number and shape), `run.init_new` does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from models.checks.errors import printable
from models.sit import sincos_pos_embed
from utils.training.starting.learned import Learned

Names = Sequence[str]
SHOWN = 3  # names in a line
# the largest rounding of a sine that was stored in bfloat16
ROUNDING = 2.0**-8


@dataclass
class Part:
    """What becomes of one part, in words; "" = nothing. `taken`: for each of the new run's rows or
    projectors the number of the checkpoint's that it takes, None = a new one."""

    carried: str = ""
    new: str = ""
    left_out: str = ""
    doubt: str = ""
    taken: list[int | None] = field(default_factory=list)

    @property
    def changes(self) -> bool:
        """Whether the numbers do not just stay where they are."""
        return bool(self.new or self.left_out or self.taken != [*range(len(self.taken))])


# --------------------------------------------------------------------------------------
# The label table.


def compare_classes(old: Learned, sit: Mapping, names: Names | None, asked: bool) -> Part:
    """Rows of the label table. `sit`: the config of the new SiT; `names`: of its classes, by label,
    None = not known yet; `asked`: run.init_new names the classes."""
    count, had = sit["num_classes"], old.sit["num_classes"]
    taken, how = match_classes(old.classes or had, names or count, asked)
    part = Part(taken=list(taken))
    kept = sum(row is not None for row in taken)
    words = [f"{kept} of {count} rows{how and f' by {how}'}"] * (kept > 0)
    fresh = [i for i, row in enumerate(taken) if row is None]
    new = [f"{len(fresh)} of {count} rows, random{_listed(names, fresh)}"] * (len(fresh) > 0)
    if sit["class_dropout_prob"] > 0:
        part.taken.append(had if old.has_null else None)
        (words if old.has_null else new).append("the null row")
    left = [f"{had - kept} of {had} rows"] * (had > kept)
    left += ["the null row"] * (old.has_null and sit["class_dropout_prob"] == 0)
    part.carried, part.new, part.left_out = (" and ".join(w) for w in (words, new, left))
    if how == "number":
        part.doubt = (
            f"whether the {count} classes of {old.folder} are those of the data is not known from "
            "their names: their rows are carried over by number; if they are others, add classes "
            "to run.init_new"
        )
    return part


def match_classes(old: Names | int, new: Names | int, asked: bool) -> tuple[list[int | None], str]:
    """For each new class the number of the old one that it is, None for another; and by what it was
    found: "name", "number" (a guess), or "" where there is nothing to tell. Without names, a number
    of classes. A list of numbers, as of data whose classes have no names, are no names."""
    had, count = (n if isinstance(n, int) else len(n) for n in (old, new))
    if not isinstance(old, int) and not isinstance(new, int):
        if list(old) == list(new):
            return list(range(count)), ""
        if _are_names(old) and _are_names(new):
            found = {name: number for number, name in enumerate(old) if name}
            taken = [found.get(name) for name in new]
            if had != count or asked or any(row is not None for row in taken):
                return taken, "name"
    if had != count or asked:
        return [None] * count, ""
    return list(range(count)), "number" if not isinstance(new, int) else ""


def _are_names(classes: Names) -> bool:
    return not all(name.isdigit() for name in classes)


def _listed(names: Names | None, numbers: Sequence[int]) -> str:
    if not names:
        return ""
    shown = [printable(names[i]) for i in numbers[:SHOWN]] + ["..."] * (len(numbers) > SHOWN)
    return f" ({', '.join(shown)})"


# --------------------------------------------------------------------------------------
# Projectors.


def compare_projectors(old: Learned, sit: Mapping, encoders: Names, asked: bool) -> Part:
    """Projectors of the new run's `encoders`; `sit` and `asked` as for classes."""
    taken: list[int | None] = []
    carried, new = [], []
    for number, name in enumerate(encoders):
        found = _projector_of(old, name, number, taken)
        fits = found is not None and _shape(old.sit, found) == _shape(sit, number)
        kept = fits and (old.encoders is not None or not asked)
        taken.append(found if kept else None)
        if kept:
            carried.append(name)
        else:
            new.append(f"of {name} ({sit['projector']}, {sit['encoder_dims'][number]} channels)")
    part = Part(carried=", ".join(carried) and f"of {', '.join(carried)}", taken=taken)
    if carried and old.sit["align_depth"] != sit["align_depth"]:
        part.carried += f", which learned at block {old.sit['align_depth']}"
    part.new = ", ".join(new)
    part.left_out = ", ".join(
        _called(old, k) for k in range(len(old.sit["encoder_dims"])) if k not in taken
    )
    if carried and old.encoders is None:
        part.doubt = (
            f"{old.folder} does not say with which encoders its SiT was aligned: its projectors "
            f"are taken for those of {', '.join(carried)}; if they are not, add projectors to "
            "run.init_new"
        )
    return part


def _projector_of(old: Learned, encoder: str, number: int, taken: Sequence) -> int | None:
    """The checkpoint's projector of an encoder; where no names are known, the one of its number."""
    if old.encoders is None:
        return number if number < len(old.sit["encoder_dims"]) else None
    own = (k for k, name in enumerate(old.encoders) if name == encoder and k not in taken)
    return next(own, None)


def _shape(sit: Mapping, number: int) -> tuple:
    """What the shape of a projector follows from, beside the width."""
    inner = sit["projector_dim"] if sit["projector"] == "mlp" else None
    return sit["projector"], sit["encoder_dims"][number], inner


def _called(old: Learned, number: int) -> str:
    known = old.encoders[number] if old.encoders else "an encoder"
    return f"of {known} ({old.sit['encoder_dims'][number]} channels)"


# --------------------------------------------------------------------------------------
# The position table.


def compare_positions(old: Learned, grid: int) -> Part:
    """The table of `grid` x `grid` tokens."""
    if old.grid == grid:
        return Part(carried=f"{grid}x{grid} tokens")
    how = "the fixed table" if is_fixed(old.positions()) else "its trained table, resized"
    return Part(new=f"{grid}x{grid} tokens, {how} (it has {old.grid}x{old.grid})")


def is_fixed(table: Tensor) -> bool:
    """Whether a position table (1, T, D) is that of sines and cosines, up to its storage."""
    fixed = sincos_pos_embed(table.shape[2], math.isqrt(table.shape[1]))
    return bool(torch.allclose(table[0].float(), fixed, rtol=0, atol=ROUNDING))


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """A position table (1, T, D) for `grid` x `grid` tokens, (1, grid^2, D) float32: the fixed one
    is made anew, one that was trained is resized bicubically."""
    dim, side = table.shape[2], math.isqrt(table.shape[1])
    if is_fixed(table):
        return sincos_pos_embed(dim, grid)[None]
    picture = table.float().transpose(1, 2).unflatten(2, (side, side))  # (1, D, side, side)
    resized = F.interpolate(picture, size=(grid, grid), mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).contiguous()
