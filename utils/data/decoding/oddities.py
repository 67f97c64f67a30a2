"""What should be known of pictures: how many are transparent, turned by EXIF, of 16 bits, animated.

They are counted while pictures are read, by whoever asks for it (`watched`): all of them where data
are packed, else some that are evenly spaced.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from models.checks.errors import UserError
from utils.data.decoding.conversion import MOST_DEPTH, WHITE, Conversion

# kinds, as they stand in meta.json; of 16-bit pictures with the power of two that none reaches
TURNED, TRANSPARENT, FRAMES = "turned by EXIF", "transparent", "animated or of many pages"
DEEP, BELOW = "16-bit ", " below "
SAMPLED = 32  # pictures that are read where not all are

_watching: ContextVar[Counter[str] | None] = ContextVar("watching", default=None)


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """What is odd about the pictures that this thread reads meanwhile, counted by kind."""
    found: Counter[str] = Counter()
    token = _watching.set(found)
    try:
        yield found
    finally:
        _watching.reset(token)


def are_watched() -> bool:
    return _watching.get() is not None


def tell(kind: str) -> None:
    """One more picture of this kind, if somebody watches."""
    if (found := _watching.get()) is not None:
        found[kind] += 1


def tell_depth(what: str, highest: int) -> None:
    """A 16-bit picture, grey or colour, with this highest value."""
    tell(f"{DEEP}{what}{BELOW}{2 ** max(8, highest.bit_length()):,}")


def sample(read: Callable[[int], object], num: int, conversion: Conversion) -> list[str]:
    """`notes_on` some of `num` pictures, evenly spaced; `read(i)` reads one, and raises `UserError`
    if it cannot be read, which is for others to say."""
    last, good = max(0, num - 1), 0
    with watched() as found:
        for i in sorted({last * k // (SAMPLED - 1) for k in range(SAMPLED)}):
            with suppress(UserError):
                read(i)
                good += 1
    return notes_on(found, good, conversion, "" if good == num else " that were looked at")


def notes_on(
    found: Mapping[str, int], num: int, conversion: Conversion, which: str = ""
) -> list[str]:
    """Sentences on what was `found` odd about `num` pictures, and what was done about it."""
    of, notes = f"of {num:,} pictures{which}", []
    if turned := found.get(TURNED):
        what = "not done, as in ADM: data.exif=true, --exif, or folder:DIR@RES,exif does it"
        what = "done" if conversion.exif else what
        notes.append(f"{turned:,} {of} are to be turned by their EXIF data, which is {what}")
    if transparent := found.get(TRANSPARENT):
        ground = "white" if conversion.background == WHITE else f"{conversion.background}"
        notes.append(f"{transparent:,} {of} are transparent: they are put on {ground}")
    if frames := found.get(FRAMES):
        notes.append(f"{frames:,} {of} are animated or of many pages: the first picture is taken")
    for what in ("grey", "colour"):
        prefix = f"{DEEP}{what}{BELOW}"
        ends = {int(kind.removeprefix(prefix).replace(",", "")): n
                for kind, n in found.items() if kind.startswith(prefix)}  # fmt: skip
        if ends:
            parts = [f"{n:,} with values below {end:,}" for end, n in sorted(ends.items())]
            text = f"{sum(ends.values()):,} {of} are 16-bit {what} ({', '.join(parts)})"
            notes.append(f"{text}: {_on_depth(what, ends, conversion.depth_range)}")
    return notes


def _on_depth(what: str, ends: Iterable[int], depth_range: tuple[int, int] | None) -> str:
    """What becomes of 16-bit pictures, whose values lie below `ends`."""
    if what == "grey" and depth_range is not None:
        return "black is {}, white is {}, as asked".format(*depth_range)
    dark = [end for end in ends if end <= MOST_DEPTH]
    if not dark:
        return "their upper 8 bits are kept"
    text = f"black is 0, white is {MOST_DEPTH:,}, so that those below {max(dark):,} are dark"
    if what == "colour":
        return f"{text}; convert them to 8 bits"
    top = max(dark) - 1
    how = f"data.depth_range=[0,{top}], --depth-range 0 {top}, or "
    return f"{text}; {how}folder:DIR@RES,depth_range=0-{top} makes {top:,} white"
