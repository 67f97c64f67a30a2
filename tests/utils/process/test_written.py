"""Only what this program has written itself is written over, by every script.

python -m pytest tests/utils/process/test_written.py
"""

import io
import json
from dataclasses import fields
from importlib import import_module

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from torch.profiler import profile

from models.checks.errors import UserError
from utils.benchmark.compare import FORMAT
from utils.data.latents import CacheMeta
from utils.pictures.grid import save_figure, save_picture
from utils.process import written
from utils.process.written import check_kind
from utils.report.page import document

# each script that writes a file which the user names: its arguments, with {} for the file
SCRIPTS = {
    "evaluate_fid": "--samples s.npz --reference r.npz --out {}.json",
    "scripts.vae_stats": "sdvae --data digits --out {}.json",
    "scripts.benchmark": "--json {}.json",
    "scripts.benchmark ": "--trace {}.json",
    "scripts.nearest_images": "--samples s.npz --training digits --out {}.png",
    "scripts.plot_solvers": "--out {}.png",
    "scripts.visualize_latents": "latents --vae sdvae --data digits --out {}.png",
    "scripts.visualize_latents ": "progress --run r --out {}.png",
    "scripts.train_classifier": "--out {}.safetensors",
    "scripts.report": ". --out {}.html",
    "scripts.reproduce_tables": "show --out DIR",
}
FOREIGN = {
    "text": b"hello\n",
    "nothing": b"",
    "JSON": b'{"metrics": {"fid": 2}, "mean": [1], "mode": "training"}',
    "a list": b"[1, 2]",
    "broken JSON": b'{"metrics": ',
    "deep JSON": b"[" * 99_999,
    "no UTF-8": b"\xff\xfe\x00",
    "HTML": b'<!DOCTYPE html><html><head><meta name="generator" content="Hugo"></head></html>',
}


def png(**texts: str) -> bytes:
    file, info = io.BytesIO(), PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (4, 4)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


FOREIGN["a picture"] = png()
FOREIGN["a picture of another program"] = png(Software="gimp", Title="REPA-E")
FOREIGN["tensors"] = save({"a": torch.zeros(2)}, {"format": "pt"})


def refused(script: str, words: list[str]) -> str:
    """What the script says to these arguments before it does anything."""
    module = import_module(script.strip())

    def begin() -> None:
        args = module.parse_args(words)
        if script == "evaluate_fid":
            module.check_args(args)

    with pytest.raises(UserError) as error:
        begin()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_writes_over_a_file_of_somebody_else(script, tmp_path, monkeypatch):
    """Nor where the name ends in something else than what is written."""
    monkeypatch.chdir(tmp_path)
    words = SCRIPTS[script].replace("DIR", str(tmp_path)).replace("{}", str(tmp_path / "out"))
    path = tmp_path / "tables.md" if "DIR" in SCRIPTS[script] else tmp_path / words.split("/")[-1]
    for content in FOREIGN.values():
        path.write_bytes(content)
        said = refused(script, words.split())
        assert f"{path} exists and is not " in said and "another name, or delete it" in said
        assert path.read_bytes() == content
    if path.stem == "out":
        other = [word.replace(path.name, "out.npz") for word in words.split()]
        assert "out.npz must end in ." in refused(script, other)


def test_what_the_program_has_written_is_written_over(tmp_path):
    save_picture(tmp_path / "a.png", Image.new("RGB", (3000, 200)))
    save_figure(Figure(figsize=(1, 1)), tmp_path / "b.png", dpi=20)
    (tmp_path / "c.html").write_text(document("title", ""))
    (tmp_path / "tables.md").write_text(f"{written.MARKDOWN_MARK}\n| a |")
    (tmp_path / "e.safetensors").write_bytes(save({"a": torch.zeros(2)}, {"classifier": "{}"}))
    (tmp_path / "f.json").write_text(json.dumps({"format": FORMAT, "mode": "training"}))
    with profile() as profiler:
        profiler.add_metadata("program", written.PROGRAM)
    profiler.export_chrome_trace(str(tmp_path / "g.json"))
    kinds = {"a.png": written.PICTURE, "b.png": written.PICTURE, "c.html": written.PAGE,
             "tables.md": written.MARKDOWN, "e.safetensors": written.CLASSIFIER,
             "f.json": written.BENCHMARK, "g.json": written.TRACE}  # fmt: skip
    for name, kind in kinds.items():
        check_kind("--out", tmp_path / name, kind)
        for other in {*kinds.values()} - {kind}:
            with pytest.raises(UserError):
                check_kind("--out", tmp_path / name, other)


def test_a_record_of_another_kind_is_not_written_over(tmp_path):
    """Each script overwrites its own records alone, and none that is too large to be one."""
    kinds = (written.EVALUATION, written.LATENT_STATS, written.SAMPLING, written.SUMMARY)
    keys = [("metrics", "comparable_to_papers", "samples"), ("vae_sha256", "mean", "std", "seed"),
            ("settings", "settings_sha256"), ("label_accuracy", "confusion_matrix")]  # fmt: skip
    path = tmp_path / "a.json"
    for kind, names in zip(kinds, keys):
        path.write_text(json.dumps(dict.fromkeys(names, 1)))
        check_kind("--out", path, kind)
        for other in {*kinds} - {kind}:
            with pytest.raises(UserError, match="exists and is not"):
                check_kind("--out", path, other)
    # the meta.json of cached latents, without which they are lost
    path.write_text(json.dumps(dict.fromkeys([field.name for field in fields(CacheMeta)], 1)))
    for kind in kinds:
        with pytest.raises(UserError, match="exists and is not"):
            check_kind("--out", path, kind)
    with path.open("ab") as file:
        file.truncate(written.LONGEST_JSON + 1)
    with pytest.raises(UserError, match="exists and is not"):
        check_kind("--out", path, written.SUMMARY)
