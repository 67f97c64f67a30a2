"""Any mode of Pillow => 8-bit RGB, as a person sees the picture; what has no range of its own, such
as floats, is refused by name.

Colour profiles (ICC) are ignored, as ADM does. Pillow turns TIFF files by itself, as they say, and
keeps the upper 8 bits of 16-bit colour.
"""

from contextlib import suppress

import numpy as np
from PIL import Image

from utils.data.decoding import oddities
from utils.data.decoding.conversion import MOST_DEPTH, PLAIN, Conversion

OPAQUE = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"}
WITH_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
REFUSED = {"F": "floats", "I": "integers of 32 bits or with a sign", "LAB": "Lab colours"}
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF tags that Pillow does not heed: the first one at 16 bits, the other at 8
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
SAMPLE_FORMAT, SIGNED = 339, 2


def to_rgb(image: Image.Image, conversion: Conversion = PLAIN) -> Image.Image:
    """Any mode => RGB. Transparent pixels show the background; 16-bit grey keeps its upper 8 bits,
    or what `conversion.depth_range` says. `ValueError` for a mode that is refused."""
    stored = stored_as(image)
    image.load()
    if is_deep_grey(image):
        rgb = _deep_grey_to_rgb(image, stored, conversion)
    elif image.mode not in OPAQUE | WITH_ALPHA or _has_signs(image):
        mode = "I" if _has_signs(image) else image.mode
        what = REFUSED.get(mode, f"pixels of the mode {mode}")
        raise ValueError(f"{what}, of no known range: convert it to 8 bits or to 16-bit grey")
    elif image.has_transparency_data:
        rgb = _on_background(image, conversion)
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")  # it would be copied
    if oddities.are_watched():
        _tell(image, stored)
    return _turned(image, rgb, conversion)


def stored_as(image: Image.Image) -> str:
    """How the file stores its pixels, in Pillow's words, which are gone once it has read them."""
    return str(getattr(image, "tile", ""))


def is_deep_grey(image: Image.Image) -> bool:
    """Whether it is grey of 16 bits: also of the mode I of 32 bits, unless the format is TIFF."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF")


def is_deep_colour(image: Image.Image, stored: str) -> bool:
    """Whether Pillow drops the lower bits of colours that are `stored` with 16."""
    return ";16" in stored and not image.mode.startswith("I")


def _has_signs(image: Image.Image) -> bool:
    """Pillow takes signed bytes of a TIFF file for others."""
    return SIGNED in getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, ())


def _deep_grey_to_rgb(image: Image.Image, stored: str, conversion: Conversion) -> Image.Image:
    values = np.asarray(image)
    own = 2**12 - 1 if "I;12" in stored else MOST_DEPTH
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = own - values
    if own == MOST_DEPTH:
        oddities.tell_depth("grey", int(values.max()))
    low, high = conversion.depth_range or (0, own)
    bins = (np.arange(MOST_DEPTH + 1) - low) * 256 // (high - low + 1)  # 256 of the same width
    grey = bins.clip(0, 255).astype(np.uint8)[values]
    rgb = Image.fromarray(grey).convert("RGB")
    if isinstance(clear := image.info.get("transparency"), int):
        oddities.tell(oddities.TRANSPARENT)
        rgb.paste(conversion.background, mask=Image.fromarray(values == clear))
    return rgb


def _on_background(image: Image.Image, conversion: Conversion) -> Image.Image:
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    low, high = rgba.getchannel("A").getextrema()
    # some programs write BMP files with an alpha channel that they leave at 0
    if low == 255 or (high == 0 and image.format == "BMP"):
        return rgba.convert("RGB")
    oddities.tell(oddities.TRANSPARENT)
    below = Image.new("RGBA", image.size, conversion.background)
    below.alpha_composite(rgba)
    return below.convert("RGB")


def _tell(image: Image.Image, stored: str) -> None:
    """Whether it is one of several pictures, and the depth of its colours."""
    if is_deep_colour(image, stored):
        upper_bits = int(np.asarray(image.convert("RGB")).max())
        oddities.tell_depth("colour", upper_bits << 8 | 255)
    with suppress(Exception):  # Pillow looks for the second one in the file, which may be damaged
        if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: of phones
            oddities.tell(oddities.FRAMES)


def _turned(image: Image.Image, rgb: Image.Image, conversion: Conversion) -> Image.Image:
    """The RGB picture as the EXIF data of the file ask, if that is wanted."""
    if not (conversion.exif or oddities.are_watched()):
        return rgb
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow raises many kinds for damaged EXIF data, which then say nothing
        return rgb
    if turn is None:
        return rgb
    oddities.tell(oddities.TURNED)
    return rgb.transpose(turn) if conversion.exif else rgb
