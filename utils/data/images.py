"""Reading and converting images: the only place where value ranges change.

Suffixes: `_u8` uint8 in 0..255, `_pm1` float in [-1, 1], `_01` float in [0, 1]. Tensors have the
shape (N, 3, H, W) or (3, H, W); their memory may be channels-last.
"""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from models.checks.errors import UserError
from utils.data.decoding.conversion import Conversion
from utils.data.decoding.formats import read_formats, why_unidentified
from utils.data.decoding.pixels import to_rgb

# Written into packed data; change it with `center_crop` and `to_rgb`. The first version dropped
# alpha, as ADM does, so that transparent pictures have other pixels in it, and no others have.
CROP_VERSION, FIRST_CROP = "adm-center-crop-2", "adm-center-crop-1"
READ_CROPS = (FIRST_CROP, CROP_VERSION)
# Of one image as it is stored, and as it is resized before the crop: 256 MiB of RGB. Pillow warns
# from this number on, and refuses only twice as many.
MAX_PIXELS = 89_478_485


class ImageFileError(UserError):
    """An image that the file system does not give; `reason` says why, without the name."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class UnreadableImageError(ImageFileError):
    """Bytes that are no image, or a broken one, or one that is far too large."""


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to (size, size) (guided-diffusion; Dhariwal & Nichol, arXiv 2105.05233).

    Halve with BOX while the short side is at least 2 * size, resize it to `size` with BICUBIC (also
    upwards), crop the centre (the odd pixel goes to the right and bottom).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    resized = (round(image.width * scale), round(image.height * scale))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(
    file: Path | BinaryIO, where: str, resolution: int, conversion: Conversion
) -> torch.Tensor:
    """Decode, convert to RGB, centre-crop: (3, resolution, resolution) uint8. Of an animation, or a
    file of many pages, the first picture is taken.

    `UnreadableImageError` if the content is bad, plain `ImageFileError` if the file system fails.
    """
    with open_image(file, where) as image:
        short, long = sorted(image.size)
        if max(short, resolution) * long * max(1, resolution / short) > MAX_PIXELS:
            sides = f"{image.width} x {image.height}, too narrow to be resized to {resolution} px"
            raise ValueError(f"{sides} (at most {MAX_PIXELS:,} pixels)")
        return array_to_u8(center_crop(to_rgb(image, conversion), resolution))


@contextmanager
def open_image(file: Path | BinaryIO, where: str) -> Iterator[Image.Image]:
    """An image of which only the header has been read, and found not to be too large. What is
    raised while it is open is raised as in `read_image`; a `UserError` stays what it is."""
    try:
        # Pillow's warnings, about metadata and size, would come once per image and epoch.
        with (
            warnings.catch_warnings(action="ignore"),
            _stream(file) as stream,
            _identified(stream) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                sides = f"{image.width} x {image.height} pixels"
                raise ValueError(f"{sides}, expected at most {MAX_PIXELS:,}")
            yield image
    except UserError:
        raise
    except Exception as error:  # on broken files Pillow's decoders raise whatever their parser does
        if isinstance(error, OSError) and error.errno is not None:
            reason = error.strerror or str(error)
            text = f"cannot read {where}: {reason}; repair or remove it"
            raise ImageFileError(text, reason) from error
        plain = isinstance(error, OSError | ValueError | Image.DecompressionBombError)
        reason = str(error) if plain and str(error) else f"{type(error).__name__}: {error}"
        text = f"cannot decode {where}: {reason}; replace or remove it, or pack the data"
        text += " (scripts/prepare_data.py skips such files)"
        raise UnreadableImageError(text, reason) from error


def _identified(stream: BinaryIO) -> Image.Image:
    try:
        return Image.open(stream, formats=read_formats())
    except UnidentifiedImageError:  # its text holds a memory address
        stream.seek(0)
        raise ValueError(why_unidentified(stream.read(1024))) from None


@contextmanager
def _stream(file: Path | BinaryIO) -> Iterator[BinaryIO]:
    """A regular file, opened; a FIFO or a device, which might never answer, is a `ValueError`."""
    if not isinstance(file, Path):
        yield file
        return
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("not a regular file")
    with open(handle, "rb") as stream:
        yield stream


def array_to_u8(image: np.ndarray | Image.Image) -> torch.Tensor:
    """(H, W, 3) uint8 => a (3, H, W) tensor: a view of a copy that keeps (H, W, 3) memory. Batches
    of such images are channels-last without any permutation of pixels."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def u8_to_pm1(x_u8: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 => float32 in [-1, 1]."""
    return x_u8.float() / 127.5 - 1


def pm1_to_u8(x_pm1: torch.Tensor, rule: str = "round") -> torch.Tensor:
    """Float in [-1, 1] => uint8, clamped. `truncate` is what the published samples were made with;
    it darkens every image by half a grey level on average."""
    assert rule in ("round", "truncate"), rule
    x = (x_pm1.float() + 1) * 127.5
    return (x.round() if rule == "round" else x).clamp(0, 255).to(torch.uint8)


def pm1_to_01(x_pm1: torch.Tensor) -> torch.Tensor:
    """[-1, 1] => [0, 1]."""
    return (x_pm1 + 1) / 2
