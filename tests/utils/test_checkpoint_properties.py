"""Properties of checkpoint retention for any set of entries in checkpoints/."""

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from utils.checkpoint import Checkpoints, name_of_step
from utils.sealed import STATE, find_fault, seal_checkpoint

STEPS = st.one_of(st.integers(0, 40), st.sampled_from([9_999_999, 10_000_000, 123_456_789]))
KINDS = ("whole", "whole", "whole", "changed", "cut state", "no state", "empty", "file", "link",
         "state of another step")  # fmt: skip
FOREIGN = st.sets(st.sampled_from(["notes.txt", "5", "00000005", "0000005.bak", "best", "-000001",
                                   "\u0661\u0662\u0663\u0664\u0665\u0666\u0667"]))  # fmt: skip


def write(folder: Path) -> None:
    (folder / "vae").mkdir()
    (folder / "vae" / "weights").write_bytes(b"numbers")


def make(folder: Path, step: int, kind: str) -> None:
    """An entry of `folder` under the name of a step."""
    path = folder / name_of_step(step)
    if kind == "file":
        path.write_text("not a folder")
        return
    if kind == "empty":
        path.mkdir()
        return
    if kind == "link":  # to a whole one, elsewhere
        seal_checkpoint(folder.parent / f"elsewhere{step}", step, write, {})
        path.symlink_to(folder.parent / f"elsewhere{step}")
        return
    named = step + 1 if kind == "state of another step" else step
    seal_checkpoint(path, named, write, {})
    if kind == "changed":
        (path / "vae" / "weights").write_bytes(b"nUmbers")
    elif kind == "cut state":
        (path / STATE).write_bytes((path / STATE).read_bytes()[:-20])
    elif kind == "no state":
        (path / STATE).unlink()


def bytes_below(folder: Path) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            key = str(path.relative_to(folder))
            if path.is_symlink():
                found[key] = str(path.readlink())
            else:
                found[key] = path.read_bytes() if path.is_file() else "folder"
    return found


@given(
    st.dictionaries(STEPS, st.sampled_from(KINDS), max_size=7),
    FOREIGN,
    st.integers(1, 3),
    st.sampled_from([0, 5, 10]),
)
def test_the_newest_whole_ones_survive_and_foreign_entries_are_untouched(
    entries, foreign, keep_last, milestone_every
):
    run = Path(tempfile.mkdtemp())
    folder = run / "checkpoints"
    folder.mkdir()
    try:
        for step, kind in entries.items():
            make(folder, step, kind)
        for name in foreign:
            (folder / name).mkdir()
            (folder / name / "mine").write_text("untouched")
        before = bytes_below(folder)
        checkpoints = Checkpoints(run, keep_last, milestone_every)
        checkpoints.prune()
        after = bytes_below(folder)
        whole = sorted(step for step, kind in entries.items() if kind == "whole")
        kept = set(whole[-keep_last:])
        kept |= {step for step in whole if milestone_every and step % milestone_every == 0}
        gone = {name_of_step(step) for step in set(whole) - kept}
        expected = {k: v for k, v in before.items() if k.split(os.sep)[0] not in gone}
        assert after == expected
        latest = Checkpoints(run, keep_last).latest(lambda line: None)
        assert latest == (folder / name_of_step(whole[-1]) if whole else None)
        assert latest is None or find_fault(latest) is None
    finally:
        shutil.rmtree(run)
