"""The pictures of runs over time, inside the page: recompressed, at most so many, one slider."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from utils.report.charts import swatch
from utils.report.collect import PICTURES, Run
from utils.report.markup import Html, join, tag

MOST_PICTURES = 40  # of one run, of all kinds
LARGEST_SIDE = 1024  # pixels; larger ones are made smaller
LARGEST_FILE = 64 * 2**20  # bytes of a picture that is opened
LARGEST_AREA = 64 * 10**6  # pixels of it
LOSSLESS = 96 * 2**10  # bytes of a PNG up to which it is kept without loss
QUALITY = 82  # of WebP beyond that

# what the pictures of a kind show, for who does not see them
SHOWN = {
    "": "a grid of images that the run's averaged SiT has generated",
    "reconstructions": "images, and below them what the VAE makes of them",
    "latents": "latents shown as colours beside their images",
}


def gallery(runs: Sequence[Run]) -> Html | None:
    """All pictures by kind, and the slider; None if there are none."""
    chosen = {run.name: choose(run) for run in runs}
    steps = sorted({s for kinds in chosen.values() for kept in kinds.values() for s in kept})
    if not steps:
        return None
    kinds = dict.fromkeys(kind for kept in chosen.values() for kind in kept)
    if len(runs) == 1:
        figures = [
            over_time(runs[0], kind, chosen[runs[0].name][kind], title(kind)) for kind in kinds
        ]
        return join(slider(steps), tag("div", *figures, class_="pictures"), remarks(runs, chosen))
    parts = []
    for kind in kinds:
        figures = [
            over_time(run, kind, chosen[run.name][kind], (swatch(i), tag("bdi", run.name)))
            for i, run in enumerate(runs)
            if kind in chosen[run.name]
        ]
        parts += [tag("h3", title(kind)), tag("div", *figures, class_="pictures")]
    return join(slider(steps), parts, remarks(runs, chosen))


def title(kind: str) -> str:
    return PICTURES.get(kind, kind)


def over_time(run: Run, kind: str, kept: dict[int, "Picture"], head: object) -> Html:
    """All pictures of one kind of one run, one of which is shown."""
    caption = tag("figcaption", tag("b", head), tag("span", f" step {max(kept):,}", class_="step"))
    return tag("figure", caption, shown(run, kind, kept), class_="over-time")


def slider(steps: Sequence[int]) -> Html:
    """Works with the page's script alone, which shows it."""
    last = len(steps) - 1
    words = ",".join(map(str, steps))
    control = tag(
        "input",
        id="step-slider",
        type="range",
        min=0,
        max=last,
        value=last,
        step=1,
        data_steps=words,
        aria_valuetext=f"step {steps[-1]:,}",
    )
    label = tag(
        "label",
        "Pictures after step ",
        tag("b", f"{steps[-1]:,}"),
        for_="step-slider",
    )
    hint = tag("span", "arrow keys move it", class_="hint")
    return tag("div", label, control, hint, class_="slider", hidden=True)


class Picture(NamedTuple):
    """As it is in the page."""

    uri: str
    width: int
    height: int


def choose(run: Run) -> dict[str, dict[int, Picture]]:
    """kind => step => picture: at most `MOST_PICTURES`, evenly over the steps, the last included.
    Those that cannot be read are noted."""
    steps = sorted({step for files in run.pictures.values() for step in files})
    most = max(1, MOST_PICTURES // max(1, len(run.pictures)))
    kept = set(spread(steps, most))
    found: dict[str, dict[int, Picture]] = {}
    for kind, files in run.pictures.items():
        for step in sorted(kept & set(files)):
            try:
                found.setdefault(kind, {})[step] = recompress(files[step])
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                run.notes.append(f"{files[step].name} is left out, it cannot be read ({error})")
    return {kind: some for kind, some in found.items() if some}


def spread(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of the items, evenly, the first and the last included."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[-1]]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def recompress(path: Path) -> Picture:
    """A picture as WebP: without loss where that is small, else with little."""
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE >> 20} MiB")
    with Image.open(path, formats=("PNG",)) as opened:
        if opened.width * opened.height > LARGEST_AREA:
            raise ValueError(f"it has {opened.width} x {opened.height} pixels")
        image = opened.convert("RGB")
    scale = LARGEST_SIDE / max(image.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    small = path.stat().st_size <= LOSSLESS
    content = encode(image, lossless=True) if small else encode(image, quality=QUALITY)
    return Picture(f"data:image/webp;base64,{base64.b64encode(content).decode()}", *image.size)


def encode(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", method=4, **options)
    return buffer.getvalue()


def shown(run: Run, kind: str, kept: dict[int, Picture]) -> list[Html]:
    """Every picture of one kind; all but the last one are hidden until the script shows them."""
    last, what = max(kept), SHOWN.get(kind, kind)
    return [
        tag(
            "img",
            src=each.uri,
            alt=f"{run.name} after {step:,} steps: {what}",
            data_step=step,
            width=each.width,
            height=each.height,
            hidden=step != last,
        )
        for step, each in kept.items()
    ]


def remarks(runs: Sequence[Run], chosen: dict[str, dict[str, dict[int, Picture]]]) -> Html:
    """How many of how many pictures, and how they were changed."""
    there = sum(len(files) for run in runs for files in run.pictures.values())
    here = sum(len(kept) for kinds in chosen.values() for kept in kinds.values())
    text = (
        f"{here} of {there} pictures are in this page: at most {MOST_PICTURES} of a run, "
        "spread evenly, the first and the last included. They are WebP here, with at most "
        f"{LARGEST_SIDE} pixels a side; the files are in the run's folder, in samples/."
    )
    return tag("p", text, class_="remarks")
