"""The progress bar: each network's losses in a terminal in turn, all of them in a log file.

python -m pytest tests/utils/showing/test_bar.py
"""

import io
import sys

import pytest

from utils.showing.bar import LINES_APART, SILENCE, ProgressBar, loss_groups

ROW = {
    "loss/vae/pixel": 0.25,
    "loss/vae/kl": 12.0,
    "grad_norm/vae": 1.0,
    "loss/disc/hinge": 0.9991,
    "loss/sit/diffusion": 0.8125,
    "images_per_second": 212.34,
    "seconds_waiting_for_data": 0.01,
}
SPEED = "212.3 images/s, waiting 7%"


class Screen(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("utils.showing.bar.time.monotonic", lambda: now[0])
    return now


def screen(monkeypatch, terminal: bool) -> Screen:
    shown = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def test_losses_are_grouped_by_network_and_nothing_else_is():
    assert loss_groups(ROW) == {
        "VAE": "pixel 0.250 kl 12.000",
        "SiT": "diffusion 0.812",
        "discriminator": "hinge 0.999",
    }
    assert loss_groups({"images_per_second": 1.0}) == {}


def test_a_terminal_shows_the_networks_in_turn(monkeypatch):
    shown = screen(monkeypatch, terminal=True)
    bar = ProgressBar(0, 100, batch_size=32)
    lines = []
    for _ in range(4):
        bar.update()
        bar.show(ROW)
        bar.show({})  # a step without a log line changes nothing
        lines.append(bar.bar.postfix)
    assert lines == [
        f"{SPEED}, VAE pixel 0.250 kl 12.000",
        f"{SPEED}, SiT diffusion 0.812",
        f"{SPEED}, discriminator hinge 0.999",
        f"{SPEED}, VAE pixel 0.250 kl 12.000",
    ]
    bar.close()
    assert "100" in shown.getvalue()


def test_a_log_file_gets_whole_lines_with_everything_and_not_too_many(monkeypatch, clock):
    shown = screen(monkeypatch, terminal=False)
    bar = ProgressBar(200, 1000, batch_size=32)
    for step in range(201, 1001):
        bar.update()
        bar.show(ROW if step % 100 == 0 else {})
        clock[0] += LINES_APART / 150
    bar.close()
    text = shown.getvalue()
    assert "\r" not in text
    assert [line.split(" of")[0] for line in text.splitlines()] == [
        f"step {n}" for n in (300, 500, 700, 900, "1,000")
    ]
    every = "VAE pixel 0.250 kl 12.000, SiT diffusion 0.812, discriminator hinge 0.999"
    assert text.splitlines()[0] == f"step 300 of 1,000, 01:45 left, {SPEED}, {every}"


def test_a_log_file_hears_of_slow_steps_before_the_first_log_line(monkeypatch, clock):
    shown = screen(monkeypatch, terminal=False)
    bar = ProgressBar(0, 1000, batch_size=32)
    for _ in range(4):
        clock[0] += SILENCE + 1
        bar.update()
    assert shown.getvalue().splitlines()[-1] == "step 4 of 1,000"


@pytest.mark.parametrize("terminal", [True, False])
def test_other_ranks_show_nothing(terminal, monkeypatch):
    shown = screen(monkeypatch, terminal)
    bar = ProgressBar(0, 2, batch_size=32, shown=False)
    bar.update()
    bar.show(ROW)
    bar.close()
    assert shown.getvalue() == ""
