"""How far a run is: a bar in a terminal, and a line at a time in a log file."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

NETWORKS = {"vae": "VAE", "sit": "SiT", "disc": "discriminator"}
LINES_APART = 15.0  # seconds between two lines in a log file, at least
SILENCE = 60.0  # seconds after which a line is written without new figures


class ProgressBar:
    """Steps done, time left, speed, and the losses. A terminal shows those of the VAE, the SiT and
    the discriminator in turn, the next ones at each log line; a log file, which has no narrow
    lines, all of them. Only the main process shows anything (`shown`).

    `first`: steps done at the start; `batch_size`: images of one step, on all ranks.
    """

    def __init__(self, first: int, steps: int, batch_size: int, shown: bool = True):
        self.step, self.steps, self.batch_size = first, steps, batch_size
        self.rows, self.row = 0, {}
        self.is_file = shown and not sys.stderr.isatty()
        self.written = time.monotonic() - LINES_APART  # when the last line was
        hidden = self.is_file or not shown
        self.bar = tqdm(initial=first, total=steps, disable=hidden, mininterval=0.5, unit="step")

    def update(self) -> None:
        """One more step is done."""
        self.step += 1
        self.bar.update()
        if self.is_file and time.monotonic() - self.written > SILENCE:
            self._write_line({})

    def show(self, row: dict[str, float]) -> None:
        """Show a log line; {}: there is no new one."""
        if not row:
            return
        groups = loss_groups(row)
        if groups:
            name, terms = [*groups.items()][self.rows % len(groups)]
            figures = self._speed(row) | {name: terms}
            self.bar.set_postfix_str(", ".join(" ".join(pair) for pair in figures.items()), False)
        self.rows, self.row = self.rows + 1, row
        due = time.monotonic() - self.written >= LINES_APART or self.step >= self.steps
        if self.is_file and due:
            self._write_line(self._speed(row) | groups)

    def close(self) -> None:
        self.bar.close()

    def _speed(self, row: dict[str, float]) -> dict[str, str]:
        """Images per second, and the share of the time that was spent waiting for data."""
        rate = row["images_per_second"]
        waiting = row["seconds_waiting_for_data"] * rate / self.batch_size
        return {f"{rate:.4g}": "images/s", "waiting": f"{waiting:.0%}"}

    def _write_line(self, figures: dict[str, str]) -> None:
        self.written = time.monotonic()
        words = [f"step {self.step:,} of {self.steps:,}"]
        if self.row:
            seconds = (self.steps - self.step) * self.batch_size / self.row["images_per_second"]
            words.append(f"{tqdm.format_interval(seconds)} left")
        words += [" ".join(pair) for pair in figures.items()]
        print(", ".join(words), file=sys.stderr, flush=True)


def loss_groups(row: dict[str, float]) -> dict[str, str]:
    """The losses of a log line for each network: {"SiT": "diffusion 0.812 align -0.204"}."""
    groups: dict[str, str] = {}
    for key, title in NETWORKS.items():
        terms = {name: v for name, v in row.items() if name.startswith(f"loss/{key}/")}
        if terms:
            words = (f"{name.rsplit('/', 1)[1]} {v:.3f}" for name, v in terms.items())
            groups[title] = " ".join(words)
    return groups
