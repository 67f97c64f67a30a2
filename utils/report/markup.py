"""HTML from Python: whatever is not `Html` already is escaped, and numbers are written one way."""

import html
import math
import re

VOID = {"br", "hr", "img", "input", "link", "meta"}
# control characters, halves of pairs, and signs that turn the direction of what follows
UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


class Html(str):
    """Text that is HTML and is not escaped again."""


def escape(text: object) -> Html:
    """Any text, from wherever, as what it is: never as HTML."""
    return text if isinstance(text, Html) else Html(html.escape(UNSEEN.sub("\ufffd", str(text))))


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """One element. `class_` is written class, `data_x` data-x; an attribute that is None or False
    is left out, one that is True has no value. None among the content is left out."""
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{escape(str(value))}"')
    inner = join(*content)
    return Html(f"<{' '.join(words)}>" if name in VOID else f"<{' '.join(words)}>{inner}</{name}>")


def join(*content: object) -> Html:
    """Content after content; lists are followed, None is left out."""
    parts = []
    for each in content:
        if isinstance(each, list | tuple):
            parts.append(join(*each))
        elif each is not None:
            parts.append(escape(each))
    return Html("".join(parts))


def table(caption: object, head: list, rows: list[list], numeric: bool = False) -> Html:
    """A table in a box of its own, which scrolls. The first cell of a row is its heading;
    `numeric`: the others are aligned at the right."""
    cells = [
        [tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])] for row in rows
    ]
    body = tag("tbody", [tag("tr", *row) for row in cells])
    first = tag("thead", tag("tr", [tag("th", each, scope="col") for each in head]))
    whole = tag("table", tag("caption", caption), first, body, class_="numeric" * numeric or None)
    label = f"Table: {html.unescape(re.sub('<[^>]*>', '', str(caption)))}"
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=label)


def figure(value: float | None) -> str:
    """A number with four significant digits, zeros at its end included: 1,234, 0.04700, 1.50e-6."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == 0 or (isinstance(value, int) and abs(value) < 10**7):
        return f"{value:,}"
    size = math.floor(math.log10(abs(float(f"{value:.3e}"))))
    if not -4 <= size < 7:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{max(0, 3 - size)}f}"
