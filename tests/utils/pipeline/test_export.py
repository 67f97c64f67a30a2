"""The exported folder: what lies in it, and that it loads without this repository.

python -m pytest tests/utils/pipeline/test_export.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sample_ddp
from models.checks.errors import UserError
from scripts import export_pipeline
from tests.test_sample_ddp import here, record_of
from utils.pipeline.pipeline import RepaePipeline
from utils.sampling.load import open_checkpoint
from utils.sampling.settings import SamplingSettings

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = {"classes": "6,1", "num_samples": 4, "solver": "ode-ab2", "cfg_scale": 2.0, "steps": 5}
FILES = ["README.md", "model_index.json", "pipeline.py", "sit_ema/config.json",
         "sit_ema/diffusion_pytorch_model.safetensors", "sit_ema/sit.py", "vae/config.json",
         "vae/diffusion_pytorch_model.safetensors"]  # fmt: skip


def export(*words) -> None:
    export_pipeline.main([str(word) for word in words])


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def draw(pipe, **changes) -> np.ndarray:
    how = {"num_inference_steps": 5, "guidance_scale": 2.0, "output_type": "np"}
    return pipe([6, 1, 6, 1], generator=torch.Generator().manual_seed(0), **how | changes).images


def evaluation(path: Path, of: Path, **changes) -> Path:
    """As evaluate_fid.py writes it."""
    record = {"metrics": {"gFID-50K": 12.25, "spectrum": [1.0]}, "n": 50000}
    images = {"name": str(of), "label_sampling": "balanced", "record": record_of(of)}
    record |= {"samples": images, "reference": {"name": "/home/me/VIRTUAL_imagenet256.npz"}}
    record |= {"features": {"label": "inception"}, "not_comparable_because": ["of /home/me/x.npz"]}
    path.write_text(json.dumps(record | changes))
    return path


def test_the_folder_and_its_card(checkpoint, tmp_path, monkeypatch, capsys):
    uploads, out, samples = [], tmp_path / "out", tmp_path / "a.npz"
    monkeypatch.setattr(export_pipeline, "upload", lambda *words: uploads.append(words))
    expected = here(checkpoint, samples, **FLAGS)
    record = evaluation(tmp_path / "fid.json", samples)
    run = checkpoint.parent.parent
    export(run, out, "--evaluation", record, "--push-to-hub", "me/pipeline")
    assert uploads == [(out, "me/pipeline")] and files_of(out) == FILES
    assert f"{out} written, the pipeline of {checkpoint}" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    for words in (
        '# me/pipeline\n\nClass-conditional images, from a checkpoint of REPA-E, step 1200: a lat',
        'pipe = DiffusionPipeline.from_pretrained("me/pipeline", custom_pipeline="me/pipeline", tr',
        'pipe(["tench"], guidance_scale=4.0', "| gFID-50K | 12.2500 |", "| guidance scale | 2.0 |",
        "| solver | ode-ab2 |", "| reference | VIRTUAL_imagenet256.npz |", "| images | 50000 |",
        "Not comparable with published numbers: of x.npz.", "| classes | 8: tench, golden retriev",
        "| latents | 4 x 8 x 8 |", "| step | 1200 |", "| images | 16 x 16 pixels |",
    ):  # fmt: skip
        assert words in card
    assert "/home/me" not in card and str(tmp_path) not in card
    assert str(tmp_path) not in "".join(p.read_text() for p in out.rglob("*.json"))
    pipe = RepaePipeline.from_pretrained(out)  # by the code of this repository
    assert np.array_equal(expected, draw(pipe, solver="ode-ab2"))
    pipe.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again") == FILES[1:]
    assert (tmp_path / "again/model_index.json").read_bytes() == (
        out / "model_index.json").read_bytes()  # fmt: skip
    with pytest.raises(UserError, match="only safetensors are written"):
        pipe.save_pretrained(tmp_path / "pickle", safe_serialization=False)


def test_an_exported_folder_can_be_sampled_from(make_run, tmp_path):
    """Its model_index.json alone knows the interpolant and the names."""
    export(make_run(path="cosine"), tmp_path / "out")
    found = open_checkpoint(tmp_path / "out", SamplingSettings(), ["owl"])
    assert found.settings.path == "cosine" and found.settings.classes == (6,)
    assert sample_ddp and "Not evaluated." in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_exported(checkpoint, make_run, tmp_path):
    samples = tmp_path / "a.npz"
    here(checkpoint, samples, classes="6", num_samples=1, steps=1)
    record = evaluation(tmp_path / "fid.json", samples)
    bare = evaluation(tmp_path / "b.json", samples, samples={"name": "a.npz", "record": None})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for words, said in (
        ((make_run(depth=3), "out", "--evaluation", record), "made with another sit_ema/diffusion"),
        ((checkpoint, "out", "--evaluation", bare), "its samples have no record of sample_ddp.py"),
        ((checkpoint, "out", "--evaluation", tmp_path / "no.json"), "evaluate_fid.py --samples"),
        ((checkpoint, "full"), "full exists and is not empty"),
        ((tmp_path / "absent", "out"), "no such folder"),
        ((checkpoint, "out", "--push-to-hub", "a/b/c"), "expected OWNER/NAME"),
    ):
        with pytest.raises(UserError, match=said):
            export(words[0], tmp_path / words[1], *words[2:])
    assert not (tmp_path / "out").exists()


ELSEWHERE = """
import sys, numpy as np, torch
from diffusers import DiffusionPipeline
assert not [p for p in sys.path if p.rstrip("/") == sys.argv[1]]
for name in ("utils", "models", "loss", "scripts"):
    assert name not in sys.modules

def images(pipe):
    g = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    how = {"guidance_scale": 2.0, "num_inference_steps": 5, "output_type": "np"}
    return pipe(["owl", "golden_retriever", 6, "1"], generator=g, solver="ode-ab2", **how).images

pipe = DiffusionPipeline.from_pretrained("out", custom_pipeline="out", trust_remote_code=True)
np.save("first.npy", images(pipe))
pipe.save_pretrained("again")
again = DiffusionPipeline.from_pretrained("again", trust_remote_code=True)
np.save("again.npy", images(again))
try:
    pipe("gold fish")
except ValueError as error:
    print(error)
half = DiffusionPipeline.from_pretrained("again", trust_remote_code=True, dtype=torch.bfloat16)
print(half.sit_ema.dtype, half.sit_ema.bn.running_var.dtype, images(half.to("cpu")).shape)
files = [str(getattr(module, "__file__", "")) for module in list(sys.modules.values())]
assert not [f for f in files if f.startswith(sys.argv[1]) and "site-packages" not in f]
"""


@pytest.mark.slow
def test_it_loads_without_this_repository(checkpoint, tmp_path):
    """In a process that knows nothing of it, and so does what that saves."""
    expected = here(checkpoint, tmp_path / "a.npz", **FLAGS)
    export(checkpoint, tmp_path / "out")
    root = str(Path(__file__).resolve().parents[3])
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, root], cwd=tmp_path, timeout=300, text=True,
        env=env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "class_labels: no class 'gold fish'" in done.stdout
    assert "torch.bfloat16 torch.float32 (4, 16, 16, 3)" in done.stdout
    for name in ("first", "again"):
        assert np.array_equal(expected, np.load(tmp_path / f"{name}.npy"))
    assert files_of(tmp_path / "again") == FILES[1:]
