"""Pictures mean what a person sees: transparency, depth, orientation; what is odd is counted.

python -m pytest tests/utils/data/test_decoding.py
"""

import hashlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from models.checks.errors import UserError
from tests.utils.data.pictures import picture
from utils.data.base import hash_lines
from utils.data.decoding import formats, oddities
from utils.data.decoding.conversion import PLAIN, Conversion
from utils.data.decoding.pixels import to_rgb
from utils.data.images import UnreadableImageError, read_image
from utils.data.listing import list_images, list_names
from utils.data.registry import open_source
from utils.evaluation.images.image_sets import open_images

SIDE = 24
Y, X = np.mgrid[:SIDE, :SIDE].astype(np.uint8)
RGB = np.stack([X * 9 + 20, Y * 9, (X + Y) * 4], -1)
GREY = (X + Y) * 5
ALPHA = X * 11  # from 0 to 253


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes, conversion: Conversion = PLAIN, side: int = SIDE) -> np.ndarray:
    return read_image(io.BytesIO(data), "X", side, conversion).permute(1, 2, 0).numpy()


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(rgb * share + 255 * (1 - share)).astype(np.uint8)


def gray(pixels: np.ndarray) -> np.ndarray:
    return np.dstack([pixels] * 3).astype(np.uint8)


def deep_png(pixels: np.ndarray, clear: int | None = None) -> bytes:
    """A PNG of 16 bits, (H, W) or (H, W, 3) or (H, W, 4), which not every Pillow writes. `clear`:
    the grey that is transparent."""
    height, width, *channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    kind = {(): 0, (3,): 2, (4,): 6}[tuple(channels)]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
    chunks += [(b"tRNS", struct.pack(">H", clear))] if clear is not None else []
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


# ---- formats and modes ---------------------------------------------------------------------------

SAME = {  # of these formats, what was saved
    **{kind: {} for kind in ("PNG", "BMP", "TIFF", "PPM", "JPEG2000")},
    "WEBP": {"lossless": True},
}


@pytest.mark.parametrize("kind", SAME)
def test_every_format_is_read(kind):
    data = encoded(RGB, kind, **SAME[kind])
    with oddities.watched() as found:
        assert np.array_equal(decoded(data), RGB) and not found


def test_lossy_formats_and_palettes_are_what_pillow_makes_of_them():
    for kind in ("JPEG", "GIF", *(["AVIF"] if "AVIF" not in formats.missing_formats() else [])):
        data = encoded(RGB, kind)
        assert np.array_equal(
            decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        )


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_modes_without_alpha_are_as_ever(mode):
    image = Image.fromarray(RGB).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(to_rgb(image)), expected)
    if mode not in ("CMYK", "YCbCr"):
        assert np.array_equal(decoded(encoded(image)), expected)


def test_cmyk_becomes_rgb():
    assert to_rgb(Image.new("CMYK", (4, 4), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)


def test_of_an_animation_and_of_many_pages_the_first_picture_is_taken():
    for kind in ("PNG", "WEBP", "TIFF"):
        more = {"save_all": True, "append_images": [Image.new("RGB", (SIDE, SIDE))] * 3}
        with oddities.watched() as found:
            assert np.array_equal(decoded(encoded(RGB, kind, **more, **SAME[kind])), RGB)
        assert found == {oddities.FRAMES: 1}
    phone = encoded(RGB, "MPO", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))])
    with oddities.watched() as found:  # its second picture is a copy, or a depth map
        assert np.abs(decoded(phone).astype(int) - RGB).max() < 20 and not found


def test_what_has_no_range_of_its_own_is_refused_by_name():
    signed = Image.fromarray(GREY.astype(np.int32) - 99)
    lab = Image.merge("LAB", Image.fromarray(RGB).split())
    refused = {"floats": Image.fromarray(GREY / np.float32(255)), "integers": signed, "Lab": lab}
    for word, image in refused.items():
        with pytest.raises(UnreadableImageError, match=f"cannot decode X: {word}.*convert it"):
            decoded(encoded(image, "TIFF"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\0\0\x18ftypheic", "a HEIC image, which is not read: convert it to PNG"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS .*git lfs pull"),
        (b"<!DOCTYPE html><html>", "not an image, but an HTML page"),
        (b"II*\0" + bytes(99), "a TIFF image, damaged or of a kind that Pillow does not read"),
    ],
)
def test_what_is_no_picture_is_named_by_its_first_bytes(data, words):
    with pytest.raises(UnreadableImageError, match=words):
        decoded(data)


# ---- transparency --------------------------------------------------------------------------------


def palette(image: Image.Image) -> tuple[Image.Image, np.ndarray]:
    return (found := image.convert("P", palette=Image.Palette.ADAPTIVE)), np.asarray(found)


def transparent_pictures() -> dict[str, tuple[bytes, np.ndarray]]:
    """Name: a file, and its pixels on white."""
    rgba, image = np.dstack([RGB, ALPHA]), Image.fromarray(RGB)
    p, indices = palette(image)
    colours, bytes_of_palette = np.asarray(p.convert("RGB")), bytes(7 * i % 256 for i in range(256))
    clear = np.where(indices == indices[0, 0], 0, 255)
    one_colour = np.where((RGB[3, 3] == RGB).all(-1), 0, 255)
    la = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    deep = GREY.astype(np.uint16) * 257
    first = int(indices[0, 0])
    return {
        "RGBA": (encoded(rgba), on_white(RGB, ALPHA)),
        "LA": (encoded(la), on_white(gray(GREY), ALPHA)),
        "P": (encoded(p, transparency=first), on_white(colours, clear)),
        "P with alpha": (
            encoded(p, transparency=bytes_of_palette),
            on_white(colours, np.frombuffer(bytes_of_palette, "u1")[indices]),
        ),
        "RGB with a colour": (
            encoded(RGB, transparency=tuple(RGB[3, 3].tolist())),
            on_white(RGB, one_colour),
        ),
        "L with a value": (
            encoded(GREY, transparency=int(GREY[3, 3])),
            on_white(gray(GREY), np.where(GREY[3, 3] == GREY, 0, 255)),
        ),
        "16-bit grey with a value": (
            deep_png(deep, clear=int(deep[3, 3])),
            on_white(gray(GREY), np.where(GREY[3, 3] == GREY, 0, 255)),
        ),
        "16-bit colour": (deep_png(rgba.astype(np.uint16) * 257), on_white(RGB, ALPHA)),
        "GIF": (encoded(p, "GIF", transparency=first), on_white(colours, clear)),
        "WebP": (encoded(rgba, "WEBP", lossless=True, exact=True), on_white(RGB, ALPHA)),
        "TIFF": (encoded(rgba, "TIFF"), on_white(RGB, ALPHA)),
        "JPEG 2000": (encoded(rgba, "JPEG2000"), on_white(RGB, ALPHA)),
    }


@pytest.mark.parametrize("name", transparent_pictures())
def test_transparent_pictures_are_put_on_white(name):
    """Before they are resized, so that what lies under alpha 0 touches no edge; without Pillow's
    warning on palettes."""
    data, expected = transparent_pictures()[name]
    with oddities.watched() as found, warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = decoded(data)
    assert np.abs(actual.astype(int) - expected).max() <= 1
    assert found[oddities.TRANSPARENT] == 1


def test_noise_under_alpha_0_is_not_seen_at_any_size():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    assert (decoded(encoded(np.dstack([noise, np.zeros((64, 64), "u1")]))) == 255).all()


def test_pictures_that_only_could_be_transparent_are_as_ever():
    opaque = np.full_like(GREY, 255)
    with oddities.watched() as found:
        assert np.array_equal(decoded(encoded(np.dstack([RGB, opaque]))), RGB)
        p, _ = palette(Image.fromarray(RGB))
        actual = decoded(encoded(p, transparency=bytes([255] * 256)))
        assert np.array_equal(actual, np.asarray(p.convert("RGB")))
    assert not found


def test_a_bmp_whose_alpha_was_left_at_0_is_opaque():
    """Header of 108 bytes (version 4), whose masks name an alpha channel."""
    pixels = np.dstack([RGB[..., ::-1], np.zeros_like(GREY)])[::-1].tobytes()
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII", 108, SIDE, SIDE, 1, 32, 3, len(pixels), 0, 0, 0, 0)
    head += masks + b"BGRs" + bytes(48)
    data = b"BM" + struct.pack("<IHHI", 14 + len(head) + len(pixels), 0, 0, 14 + len(head))
    assert Image.open(io.BytesIO(data + head + pixels)).mode == "RGBA"
    assert np.array_equal(decoded(data + head + pixels), RGB)


# ---- depth ---------------------------------------------------------------------------------------

DEEP = (np.arange(SIDE * SIDE) * 113 % 65536).astype(np.uint16).reshape(SIDE, SIDE)


def test_sixteen_bit_grey_keeps_its_upper_bits():
    files = [encoded(DEEP, kind) for kind in ("PNG", "TIFF", "JPEG2000")]
    for data in (*files, b"P5 24 24 65535\n" + DEEP.astype(">u2").tobytes()):
        assert np.array_equal(decoded(data), gray(DEEP >> 8))


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_range_of_depths_spreads_over_black_to_white(bits):
    """Of 2^bits values, 2^bits / 256 become one; those outside are cut."""
    how, values = Conversion(depth_range=(0, 2**bits - 1)), DEEP & 2**bits - 1
    assert np.array_equal(decoded(encoded(values), how), gray(values >> (bits - 8)))
    low, high = Conversion(depth_range=(1000, 1255)), gray((DEEP.astype(int) - 1000).clip(0, 255))
    assert np.array_equal(decoded(encoded(DEEP), low), high)


def test_other_pictures_have_no_use_for_a_range():
    how = Conversion(depth_range=(0, 9))
    assert np.array_equal(decoded(encoded(RGB), how), RGB)
    assert np.array_equal(decoded(encoded(GREY), how), gray(GREY))


def tiff_of_bits(bits: int, photometric: int, rows: bytes) -> bytes:
    """A grey TIFF of SIDE x SIDE pixels, little-endian, in one strip."""
    tags = ((256, SIDE), (257, SIDE), (258, bits), (259, 1), (262, photometric), (277, 1))
    tags += ((278, SIDE), (279, len(rows)))
    tags = sorted([*tags, (273, 8 + 2 + 12 * (len(tags) + 1) + 4)])
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + rows


def test_tiff_files_that_say_that_white_is_zero_or_that_they_hold_12_bits():
    assert np.array_equal(
        decoded(tiff_of_bits(16, 0, DEEP.tobytes())), gray((65535 - DEEP.astype(int)) >> 8)
    )
    values = (DEEP >> 4).reshape(-1, 2)  # two of them in three bytes
    rows = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8,
                     values[:, 1] & 255], -1).astype(np.uint8)  # fmt: skip
    with oddities.watched() as found:
        assert np.array_equal(decoded(tiff_of_bits(12, 1, rows.tobytes())), gray(DEEP >> 8))
    assert not found


def notes_of(*files: bytes, conversion: Conversion = PLAIN) -> list[str]:
    return oddities.sample(lambda i: decoded(files[i], conversion), len(files), conversion)


def test_the_depth_in_use_is_measured_and_said():
    eight, twelve, all16 = (encoded(DEEP & 2**bits - 1) for bits in (8, 12, 16))
    (note,) = notes_of(eight, twelve, twelve, encoded(RGB))
    assert note.startswith("3 of 4 pictures are 16-bit grey (1 with values below 256, 2 with")
    assert "below 4,096 are dark; data.depth_range=[0,4095], --depth-range 0 4095, or" in note
    (note,) = notes_of(all16)
    assert "1 of 1 pictures are 16-bit grey" in note and "upper 8 bits are kept" in note
    (note,) = notes_of(twelve, conversion=Conversion(depth_range=(0, 4095)))
    assert note.endswith("black is 0, white is 4095, as asked")
    (note,) = notes_of(deep_png(RGB.astype(np.uint16) * 16))
    assert "16-bit colour (1 with values below 4,096)" in note and "convert them" in note
    (note,) = notes_of(deep_png(RGB.astype(np.uint16) * 257))
    assert note.endswith("their upper 8 bits are kept")


# ---- orientation ---------------------------------------------------------------------------------

TURNED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p),
}


def with_orientation(orientation: int, pixels: np.ndarray = RGB, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(pixels, kind, exif=exif)


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_turns_pictures_where_it_is_asked_for(orientation):
    data = with_orientation(orientation)
    with oddities.watched() as found:
        assert np.array_equal(decoded(data), RGB)
    assert found == ({} if orientation == 1 else {oddities.TURNED: 1})
    assert np.array_equal(decoded(data, Conversion(exif=True)), TURNED[orientation](RGB))


def test_pictures_are_turned_before_they_are_cropped():
    """The odd pixel that the crop leaves out goes to the right, of the turned picture."""
    wide = np.repeat(RGB, 2, 1)[:, : SIDE + 1]
    upright = decoded(with_orientation(6, wide), Conversion(exif=True))
    assert np.array_equal(upright, np.rot90(wide, -1)[:SIDE])


def test_damaged_exif_data_say_nothing():
    data = encoded(RGB, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xff\xff\xff")
    with oddities.watched() as found:
        assert np.array_equal(decoded(data, Conversion(exif=True)), decoded(data))
    assert not found


# ---- what is said --------------------------------------------------------------------------------


def test_notes_name_the_number_of_pictures_and_what_was_done():
    files = [encoded(RGB), with_orientation(6), encoded(np.dstack([RGB, ALPHA]))]
    turned, transparent = notes_of(*files)
    assert turned.startswith("1 of 3 pictures are to be turned") and "data.exif=true" in turned
    assert transparent == "1 of 3 pictures are transparent: they are put on white"
    assert "which is done" in notes_of(*files, conversion=Conversion(exif=True))[0]
    (many,) = notes_of(*[files[1]] * 99)
    assert many.startswith("32 of 32 pictures that were looked at are to be turned")
    assert notes_of(files[0], b"") == []


def test_folders_say_what_their_pictures_are_like(tmp_path):
    (tmp_path / "a.png").write_bytes(with_orientation(3))
    (tmp_path / "b.png").write_bytes(encoded(RGB))
    assert "1 of 2 pictures are to be turned" in open_images(tmp_path).notes[0]
    assert "1 of 2 pictures are to be turned" in open_images(f"folder:{tmp_path}@8").notes[0]
    odd = {"16-bit colour": deep_png(RGB.astype(np.uint16)), "transparent": encoded(
        RGB, transparency=(1, 2, 3))}  # fmt: skip
    for word, data in odd.items():
        (tmp_path / "b.png").write_bytes(data)
        with pytest.raises(UserError, match=rf"b\.png: .*{word}, expected 8-bit RGB"):
            open_images(tmp_path).read(0, 2)


def test_a_conversion_makes_other_images_of_the_same_files(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(RGB))
    how = (PLAIN, Conversion(exif=True), Conversion(depth_range=(0, 9)))
    found = [open_source("folder", tmp_path, 8, conversion=each).fingerprint() for each in how]
    assert len({*found}) == 3
    # the default one, as ever: runs that began before go on
    sha256 = hashlib.sha256(encoded(RGB)).hexdigest()
    assert found[0] == hash_lines(["(8, 8)", "adm-center-crop-1", "a.png", sha256])


# ---- listing -------------------------------------------------------------------------------------


def test_formats_that_this_pillow_lacks_are_ignored_counted_and_named(tmp_path, monkeypatch):
    for name in ("a/1.avif", "a/2.AVIF", "b/1.png", "b/2.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(0).save(tmp_path / name, "PNG")
    monkeypatch.setattr(formats, "missing_formats", lambda: ("AVIF",))
    formats.is_read.cache_clear()
    formats.read_formats.cache_clear()
    try:
        found = list_images(tmp_path)
        assert found.per_class == {"a": [], "b": ["b/1.png", "b/2.tif"]}
        line = found.ignored_line()
        assert line.startswith("ignored: 2 .avif ") and "reads no AVIF: run pip install" in line
        with pytest.raises(UserError, match=r"class folder .*/a holds no images; Pillow .* AVIF"):
            open_source("folder", tmp_path, 8)
        with pytest.raises(UnreadableImageError, match=r"an AVIF image; Pillow .* here reads no"):
            decoded(b"\0\0\0\x1cftypavif" + bytes(99))
    finally:
        formats.is_read.cache_clear()
        formats.read_formats.cache_clear()


def test_an_archive_is_listed_by_the_rule_of_folders(tmp_path):
    names = ["b/2.png", "b/10.JFIF", "a/", "a/1.heic", "x.gif", "b/.x/1.png", "__MACOSX/b/._2.png"]
    found = list_names(tmp_path / "x.zip", [*names, "b/._2.png", "dataset.json", "b/.x/2.png"])
    assert found.flat == ["x.gif"] and found.per_class == {"a": [], "b": ["b/10.JFIF", "b/2.png"]}
    line = found.ignored_line()
    for part in ("1 .heic", "2 hidden folders", "1 hidden file"):
        assert part in line
    for path in [name for name in names if name[-1] != "/"] + ["b/._2.png", "dataset.json"]:
        (tmp_path / "x" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / path).touch()
    folder = list_images(tmp_path / "x")
    assert (folder.flat, folder.per_class) == (found.flat, found.per_class)
    assert sorted(folder.ignored) == sorted(found.ignored)
