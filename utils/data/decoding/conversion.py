"""What the pixels of a file mean, where files leave a choice. Imports no torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

WHITE = (255, 255, 255)
MOST_DEPTH = 2**16 - 1  # the largest value of a 16-bit grey picture


@dataclass(frozen=True)
class Conversion:
    """What is done to pictures beyond the conversion to 8-bit RGB; the defaults do what ADM does,
    but for transparency, which ADM drops."""

    # turn pictures as their EXIF data say
    exif: bool = False
    # values of 16-bit grey pictures that become black and white; None = 0 and 65535
    depth_range: tuple[int, int] | None = None
    # RGB under transparent pixels
    background: tuple[int, int, int] = WHITE

    @classmethod
    def asked(cls, exif: bool, depth_range: Sequence[int] | None) -> "Conversion":
        """Of settings, or arguments."""
        return cls(exif, (depth_range[0], depth_range[1]) if depth_range else None)

    def record(self) -> dict[str, Any]:
        """For meta.json."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def describe(self) -> str:
        """What differs from the defaults, "" for nothing: the pixels are then the same as ever, and
        so is the fingerprint of the images."""
        parts = ["exif"] if self.exif else []
        if self.depth_range is not None:
            parts.append("depth_range {} {}".format(*self.depth_range))
        if self.background != WHITE:
            parts.append("background {} {} {}".format(*self.background))
        return ", ".join(parts)


PLAIN = Conversion()
