"""tensorboard and wandb: what they get, at which step, and that a broken one ends nothing.

python -m pytest tests/utils/showing/test_trackers.py
"""

import struct
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from accelerate.tracking import GeneralTracker
from PIL import Image

from tests.tiny import tiny_config
from utils.showing.trackers import ID_FILE, Trackers, run_id
from utils.training.tracking import Tolerance

PICTURE = Image.new("RGB", (6, 4), (1, 2, 3))


class Recorder(GeneralTracker):
    """A tracker that keeps its calls, or fails at each."""

    name, requires_logging_directory = "recorder", False

    def __init__(self, broken: bool = False):
        super().__init__()
        self.broken, self.calls = broken, []

    @property
    def tracker(self):
        return self

    def log(self, values, step=None, **how):
        if self.broken:
            raise RuntimeError("no connection")
        self.calls.append((values, step, how))

    log_images = log

    def finish(self):
        self.log("finish")


def test_one_that_fails_is_said_once_and_the_other_gets_everything(accelerator, capsys):
    broken, whole = Recorder(broken=True), Recorder()
    accelerator.trackers = [broken, whole]
    trackers = Trackers(accelerator, Tolerance().of)
    for step in (1, 2):
        trackers.log({"lr/sit": 0.5}, step)
        trackers.log_picture("samples", PICTURE, step)
    trackers.finish()
    lines = [({"lr/sit": 0.5}, step) for step in (1, 2)]
    assert [call[:2] for call in whole.calls if "lr/sit" in call[0]] == lines
    ((name, images),) = whole.calls[1][0].items()
    assert name == "pictures/samples" and np.array_equal(images, np.asarray(PICTURE)[None])
    assert whole.calls[-1][0] == "finish" and not accelerator.trackers
    assert capsys.readouterr().err.count("no connection") == 3  # a line, a picture, the end


def test_one_that_cannot_begin_is_left_out(accelerator, tmp_path, monkeypatch, capsys):
    """wandb without a login, say: tensorboard begins all the same."""
    fake = ModuleType("wandb")
    fake.init = lambda **_: (_ for _ in ()).throw(RuntimeError("no API key"))  # type: ignore
    monkeypatch.setitem(sys.modules, "wandb", fake)
    accelerator.log_with = ["wandb", "tensorboard"]
    trackers, config = Trackers(accelerator, Tolerance().of), tiny_config(f"run.out={tmp_path}")
    config.run_dir.mkdir()
    trackers.open(config, 0)
    assert [tracker.name for tracker in trackers.all] == ["tensorboard"]
    assert "curves of wandb not written (no API key)" in capsys.readouterr().err
    trackers.finish()


def test_wandb_goes_on_with_its_run_inside_the_folder_and_takes_steps_that_go_back(
    accelerator, tmp_path, monkeypatch
):
    """With a stand-in for the library, which is no requirement; the next test has the real one."""
    begun, logged = [], []
    run = SimpleNamespace(
        define_metric=lambda name, step_metric: logged.append((name, step_metric)),
        log=lambda values, step=None: logged.append((values, step)),
        finish=lambda: None,
    )
    fake = ModuleType("wandb")
    fake.init = lambda **how: (begun.append(how), run)[1]  # type: ignore[attr-defined]
    fake.Image = lambda image: image.shape  # type: ignore[attr-defined]
    fake.config = SimpleNamespace(update=lambda *_, **__: None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = tiny_config(f"run.out={tmp_path}")
    config.run_dir.mkdir()
    accelerator.log_with = ["wandb"]
    for first in (0, 40):
        trackers = Trackers(accelerator, Tolerance().of)
        trackers.open(config, first)
        trackers.log({"loss": 1.0}, first + 20)
        trackers.log_picture("samples", PICTURE, first + 20)
        trackers.finish()
    assert begun[0] == begun[1]
    assert begun[0]["id"] == (config.run_dir / ID_FILE).read_text().strip()
    expected = {"project": "repa-e", "name": "tiny", "dir": str(config.run_dir), "resume": "allow"}
    assert expected.items() <= begun[0].items()
    assert logged[:3] == [
        ("*", "step"),
        ({"loss": 1.0, "step": 20}, None),
        ({"pictures/samples": [(4, 6, 3)], "step": 20}, None),
    ]


def test_the_id_of_a_folder_is_made_once(tmp_path):
    assert run_id(tmp_path) == run_id(tmp_path) != ""
    other = tmp_path / "other"
    other.mkdir()
    assert run_id(other) != run_id(tmp_path)


def chunks(data: bytes) -> Iterator[bytes]:
    """The records in a file of wandb: LevelDB's log format behind a header of 7 bytes."""
    block, place, parts = 32768, 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
def test_the_real_wandb_offline_stays_in_the_folder(accelerator, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="an optional package")
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    config = tiny_config(f"run.out={tmp_path / 'exps'}")
    config.run_dir.mkdir(parents=True)
    accelerator.log_with = ["wandb"]
    for first in (0, 10):
        trackers = Trackers(accelerator, Tolerance().of)
        trackers.open(config, first)
        for step in (first + 20, first + 30):
            trackers.log({"loss": float(step)}, step)
        trackers.log_picture("samples", PICTURE, first + 30)
        trackers.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["exps"]
    steps, ids = [], set()
    for path in sorted(config.run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in chunks(path.read_bytes()):
            record = messages.Record()
            record.ParseFromString(data)
            items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            steps += [int(items["step"])] if "step" in items else []
            ids |= {record.run.run_id} - {""}
    assert steps == [20, 30, 30, 30, 40, 40]
    assert ids == {run_id(config.run_dir)}
    assert list(config.run_dir.rglob("media/images/**/*.png"))
