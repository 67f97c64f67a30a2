"""Nothing in a file of somebody else is executed: not in a source of ours (by its syntax), and not
by any command that reads a file (by hostile files at every place).

python -m pytest tests/test_untrusted_files.py        # -m slow: every hostile file at every place
"""

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.test_house import FILES
from tests.tiny import TINY, run_here
from utils.sealed import STATE, seal_checkpoint

# ---------------------------------------------------------------- the sources

FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "joblib", "dill", "cloudpickle", "shelve"}
FORBIDDEN_MODULES |= {"marshal", "code", "runpy"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
FORBIDDEN_CALLS |= {"torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"}
FORBIDDEN_CALLS |= {"torch.hub.load_state_dict_from_url", "torch.export.load"}
FORBIDDEN_METHODS = {"from_pretrained", "single_file", "from_single_file", "extractall"}
FORBIDDEN_METHODS |= {"unsafe_load", "full_load", "unsafe_load_all", "full_load_all"}
FORBIDDEN_WORDS = {"trust_remote_code", "checkpoint_path"}  # of timm, which may unpickle it
# strict, of safetensors, and by this repository's code alone (utils/pipeline/pipeline.py)
OURS = {"RepaePipeline.from_pretrained"}
# commands that start others, with words of their own and never through a shell
STARTERS = {"utils/provenance.py", "utils/paper/digits_study.py"}


def constant(call: ast.Call, word: str) -> object:
    """The value of a keyword if it is a constant; None if it is not there."""
    found = [k.value for k in call.keywords if k.arg == word]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


def faults_of_call(call: ast.Call, file: str) -> list[str]:
    name = ast.unparse(call.func)
    words = {keyword.arg for keyword in call.keywords}
    last = name.rsplit(".", 1)[-1]
    wrong = {
        "is forbidden": name in FORBIDDEN_CALLS
        or (last in FORBIDDEN_METHODS and "." in name and name not in OURS),
        "without weights_only=True": name.endswith("torch.load")
        and constant(call, "weights_only") is not True,
        "with allow_pickle": "allow_pickle" in words
        and constant(call, "allow_pickle") is not False,
        "with a loader that is not safe": name in ("yaml.load", "yaml.load_all", "yaml.Loader"),
        "without formats": name.endswith("Image.open") and "formats" not in words,
        "with a forbidden word": bool(words & FORBIDDEN_WORDS),
        "through a shell": "shell" in words,
        "starts a program": name.startswith("subprocess.") and file not in STARTERS,
    }
    return [f"{file}:{call.lineno} {name} {what}" for what, is_so in wrong.items() if is_so]


def faults_of_source(tree: ast.AST, file: str) -> list[str]:
    found = []
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        found += [f"{file}: {m}" for m in modules if m.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            found += faults_of_call(node, file)
        if isinstance(node, ast.ClassDef) and any("yaml" in ast.unparse(b) for b in node.bases):
            bases = [ast.unparse(base) for base in node.bases]
            found += [
                f"{file}: {b}" for b in bases if b not in ("yaml.SafeLoader", "yaml.SafeDumper")
            ]
    return found


def test_no_source_of_ours_can_execute_a_file():
    assert not [fault for file, tree in FILES.items() for fault in faults_of_source(tree, file)]


def test_what_reads_pickles_looks_nothing_up_by_a_name():
    """Neither an attribute nor a module: what a pickle names can't be reached from there."""
    for name in ("pickles", "objects", "tensors", "archives"):
        tree = FILES[f"models/weights/{name}.py"]
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                   for alias in node.names}  # fmt: skip
        assert not names & {"getattr", "setattr", "globals", "import_module", "attrgetter"}, name
        assert not modules & {"os", "importlib", "builtins", "copyreg"}, name


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=flag)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(t, yaml.Loader)",
        "yaml.unsafe_load(t)",
        "class L(yaml.Loader): pass",
        "Image.open(p)",
        "eval(t)",
        "os.system(t)",
        "subprocess.run([t])",
        "SiT.from_pretrained(p)",
        "f(trust_remote_code=True)",
        "timm.create_model(n, checkpoint_path=p)",
    ],
)
def test_what_could_would_be_found(line):
    assert faults_of_source(ast.parse(line), "a.py")


# ---------------------------------------------------------------- hostile files


class Bomb:
    """Unpickling it creates the file `mark`."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), stream := io.BytesIO())
    path.write_bytes(stream.getvalue())


def eps(path: Path, mark: Path) -> None:
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n"
        + f"({mark}) (w) file closefile showpage\n%%EOF\n".encode()
    )


def npz(path: Path, bomb: Bomb) -> None:
    held = np.array([bomb], dtype=object)
    with path.open("wb") as file:
        np.savez(file, arr_0=held, mu=held, sigma=held, meta=held)


HOSTILE = {
    "zip": lambda path, bomb: torch.save(bomb, path.open("wb")),
    "state": lambda path, bomb: torch.save(
        {"state_dict": {"a": bomb}, "model": bomb}, path.open("wb")
    ),
    "legacy": lambda path, bomb: torch.save(
        bomb, path.open("wb"), _use_new_zipfile_serialization=False
    ),
    "pickle": lambda path, bomb: path.write_bytes(pickle.dumps(bomb)),
    "npy": lambda path, bomb: np.save(path.open("wb"), np.array([bomb], dtype=object)),
    "npz": npz,
    "yaml": lambda path, bomb: path.write_text(
        f"!!python/object/apply:builtins.open ['{bomb.mark}', w]\n"
    ),
    "eps": lambda path, bomb: eps(path, bomb.mark),
    "script": lambda path, bomb: torchscript(path),
    "empty": lambda path, bomb: path.write_bytes(b""),
    "folder": lambda path, bomb: path.mkdir(),
    "fifo": lambda path, bomb: os.mkfifo(path),
    "cut": lambda path, bomb: save_cut(path),
}
ARRAYS = ("samples", "reference", "eval.reference")  # places where a name must end in .npz
FAST = ("zip", "npy")  # at every place also without -m slow


def save_cut(path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def hostile(kind: str, path: Path, mark: Path) -> Path:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    HOSTILE[kind](path, Bomb(mark))
    return path


def test_the_hostile_files_are_real(tmp_path):
    mark = tmp_path / "executed"
    loads = {
        "zip": lambda path: torch.load(path, weights_only=False),
        "state": lambda path: torch.load(path, weights_only=False),
        "legacy": lambda path: torch.load(path, weights_only=False),
        "pickle": lambda path: pickle.loads(path.read_bytes()),
        "npy": lambda path: np.load(path, allow_pickle=True),
        "npz": lambda path: np.load(path, allow_pickle=True)["arr_0"],
    }
    for kind, load in loads.items():
        load(hostile(kind, tmp_path / "f", mark))
        assert mark.exists(), kind
        mark.unlink()


def require_refusal(words: list, mark: Path, capsys, context: object) -> None:
    """The command ends with exit code 2 and one line on stderr, and `mark` does not exist."""
    capsys.readouterr()
    code = run_here(*words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert not mark.exists(), (context, "was executed")
    assert (code, len(lines)) == (2, 1), (context, code, lines)


FILE = "FILE"  # in a command: the hostile file
TRAIN = ["train_repae.py", *TINY]
LPIPS = ["loss.reg.lpips=1", "vae.train=true"]
PLACES = {
    "config": ["train_repae.py", "--config", FILE],
    "doctor": ["scripts/doctor.py", "--config", FILE],
    "init_from": [*TRAIN, f"run.init_from={FILE}"],
    "resume": [*TRAIN, f"run.resume={FILE}"],
    "vae.name": [*TRAIN, f"vae.name={FILE}"],
    "vae.weights": [*TRAIN, f"vae.weights={FILE}"],
    "disc.weights": [*TRAIN, f"disc.weights={FILE}"],
    "encoder.weights": [*TRAIN, f"encoder.weights=[{FILE}]"],
    "lpips_weights": [*TRAIN, *LPIPS, f"loss.reg.lpips_weights={FILE}"],
    "eval.weights": [*TRAIN, "eval.every=1", "eval.features=inception", f"eval.weights={FILE}"],
    "eval.features": [*TRAIN, "eval.every=1", f"eval.features=timm:test_resnet@{FILE}"],
    "eval.reference": [*TRAIN, "eval.every=1", "eval.features=pixel", f"eval.reference={FILE}"],
    "data.latents": [*TRAIN, "vae.train=false", f"data.latents={FILE}"],
    "packed": [*TRAIN, "data.source=packed", f"data.path={FILE}"],
    "hdf5": [*TRAIN, "data.source=hdf5", f"data.path={FILE}"],
    "folder": [*TRAIN, "data.source=folder", f"data.path={FILE}"],
    "sample": ["sample_ddp.py", "--checkpoint", FILE, "--out", "OUT.npz"],
    "samples": ["evaluate_fid.py", "--samples", FILE, "--reference", "digits:test@16",
                "--features", "pixel", "--cache", "none"],
    "reference": ["evaluate_fid.py", "--samples", "digits:test@16", "--reference", FILE,
                  "--features", "pixel", "--cache", "none"],
    "inception": ["evaluate_fid.py", "--samples", "digits:test@16", "--reference", "digits:test@16",
                  "--features", "inception", "--weights", FILE, "--weights-sha256", "SHA256"],
    "dinov2": ["evaluate_fid.py", "--samples", "digits:test@16", "--reference", "digits:test@16",
               "--features", "dinov2", "--weights", FILE, "--weights-sha256", "SHA256"],
    "timm": ["evaluate_fid.py", "--samples", "digits:test@16", "--reference", "digits:test@16",
             "--features", f"timm:test_resnet@{FILE}"],
    "evaluated vae": ["evaluate_fid.py", "--vae", FILE, "--data", "digits:test@16"],
    "its weights": ["evaluate_fid.py", "--vae", "tiny-f2d4", "--vae-weights", FILE,
                    "--data", "digits:test@16"],
    "lpips": ["evaluate_fid.py", "--vae", "tiny-f2d4", "--data", "digits:test@16", "--metrics",
              "lpips", "--lpips-weights", FILE],
    "import": ["scripts/import_official.py", FILE, "OUT"],
    "import vae": ["scripts/import_official.py", "SIT", "OUT", "--time", "sit", "--vae", FILE],
    "import stats": ["scripts/import_official.py", "VAE", "OUT", "--stats", FILE],
    "import disc": ["scripts/import_official.py", "VAE", "OUT", "--discriminator", FILE],
    "export": ["scripts/export_vae.py", FILE, "OUT"],
    "export record": ["scripts/export_vae.py", "CHECKPOINT", "OUT", "--evaluation", FILE],
    "cache vae": ["scripts/cache_latents.py", "--vae", "tiny-f2d4", "--vae-weights", FILE,
                  "--data", "digits", "--resolution", "16", "--out", "OUT"],
    "cache encoder": ["scripts/cache_latents.py", "--vae", "tiny-f2d4", "--vae-weights", "hub",
                      "--data", "digits", "--resolution", "16", "--out", "OUT", "--encoders",
                      "timm:test_resnet/16", "--encoder-weights", FILE, "--encoder-grid", "4"],
    "vae_stats": ["scripts/vae_stats.py", FILE, "--data", "digits", "--resolution", "16"],
    "prepare": ["scripts/prepare_data.py", FILE, "OUT"],
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of one step, with previews and evaluations off."""
    out = tmp_path_factory.mktemp("run")
    words = [f"run.out={out}", "run.steps=1", "latent_norm.stats_images=16"]
    assert run_here(*TRAIN, *words) == 0
    return out / "tiny"


@pytest.fixture
def checkpoint(run) -> Path:
    return run / "checkpoints" / "0000001"


@pytest.fixture
def command(tmp_path, checkpoint, monkeypatch):
    """(words of a place, hostile file) => what `run_here` is given; relative outputs go to the
    test's own folder."""
    from tests.published_files import compvis_vae, original_sit_state

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def build(words: list[str], file: Path) -> list[str]:
        if "SIT" in words:
            torch.save(original_sit_state(1), tmp_path / "sit.pt")
        if "VAE" in words:
            torch.save(compvis_vae().state_dict(), tmp_path / "vae.pt")
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "0" * 64
        known = {"SIT": tmp_path / "sit.pt", "VAE": tmp_path / "vae.pt", "OUT": tmp_path / "out"}
        known |= {"OUT.npz": tmp_path / "out.npz", "CHECKPOINT": checkpoint, "SHA256": digest}
        full = [str(known.get(word, word)).replace(FILE, str(file)) for word in words]
        return [*full, f"run.out={tmp_path}"] if full[0] == "train_repae.py" else full

    return build


@pytest.mark.parametrize("kinds", [FAST, pytest.param(tuple(HOSTILE), marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.slow
def test_a_hostile_file_is_refused_at_every_place(place, kinds, tmp_path, command, capsys):
    mark = tmp_path / "executed"
    for kind in kinds:
        if kind == "folder" and place in ("folder", "prepare", "samples", "reference"):
            continue  # an empty folder has tests of its own
        suffix = "npz" if place in ARRAYS else "safetensors" if kind == "zip" else "pt"
        file = hostile(kind, tmp_path / f"file.{suffix}", mark)
        require_refusal(command(PLACES[place], file), mark, capsys, (place, kind))


# ---------------------------------------------------------------- files inside folders that we read


def each_replaced(folder: Path, kinds, tmp_path: Path):
    """(relative name, kind, a copy of `folder` in which that file is hostile, mark)."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    names = sorted(str(path.relative_to(folder)) for path in files)
    for name in names:
        for kind in kinds:
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            hostile(kind, copy / name, tmp_path / "executed")
            yield name, kind, copy


ALL_OR_FAST = pytest.mark.parametrize(
    "kinds", [("zip",), pytest.param(tuple(HOSTILE), marks=pytest.mark.slow)]
)


@ALL_OR_FAST
def test_every_file_of_a_checkpoint_that_is_sampled_or_exported(
    kinds, checkpoint, tmp_path, capsys
):
    """Without state.json, whose hashes would end it earlier."""
    plain = shutil.copytree(checkpoint, tmp_path / "plain")
    (plain / STATE).unlink()
    out = tmp_path / "out"
    for name, kind, copy in each_replaced(plain, kinds, tmp_path):
        if name.startswith("vae/"):
            words = ["scripts/export_vae.py", copy, out]
            require_refusal(words, tmp_path / "executed", capsys, (name, kind))
        if name.startswith(("vae/", "sit_ema/", "model_index")):
            words = ["sample_ddp.py", "--checkpoint", copy, "--out", out.with_suffix(".npz")]
            require_refusal(words, tmp_path / "executed", capsys, (name, kind))
    assert not out.exists()


@ALL_OR_FAST
@pytest.mark.slow
def test_every_file_of_a_checkpoint_that_a_run_starts_from(kinds, checkpoint, tmp_path, capsys):
    """Sealed by its maker: all hashes are right."""
    state = json.loads((checkpoint / STATE).read_text())
    kept = {k: v for k, v in state.items() if k not in ("files", "sha256", "format", "versions")}
    for name, kind, copy in each_replaced(checkpoint, kinds, tmp_path):
        own = (STATE, "sit/config.json", "sit_ema/config.json", "model_index.json")
        if kind in ("folder", "fifo") or name in own:
            continue  # training has its own config

        def write(draft: Path, copy: Path = copy) -> None:
            shutil.copytree(copy, draft, dirs_exist_ok=True)
            (draft / STATE).unlink()

        sealed = seal_checkpoint(tmp_path / "sealed", 1, write, kept)
        for setting in ("run.resume", "run.init_from"):
            if setting == "run.init_from" and name == "optim.pt":
                continue  # not read
            words = [*TRAIN, f"run.out={tmp_path}", f"{setting}={sealed}"]
            require_refusal(words, tmp_path / "executed", capsys, (setting, name, kind))


@ALL_OR_FAST
@pytest.mark.parametrize("source", ["packed", "hdf5", "latents"])
@pytest.mark.slow
def test_every_file_of_a_data_set(source, kinds, tmp_path, capsys):
    folder = tmp_path / "whole"
    make_data(source, folder)
    for name, kind, copy in each_replaced(folder, kinds, tmp_path):
        data = [f"data.source={source}", f"data.path={copy}"]
        if source == "latents":
            data = ["vae.train=false", f"data.latents={copy}"]
        words = [*TRAIN, f"run.out={tmp_path / 'run'}", "run.steps=1", *data]
        capsys.readouterr()
        code = run_here(*words)
        assert not (tmp_path / "executed").exists(), (name, kind)
        lines = capsys.readouterr().err.splitlines()
        # a file that this command does not read is no reason to refuse
        assert code in (0, 2) and not any("Traceback" in line for line in lines), (name, kind)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def make_data(source: str, folder: Path) -> None:
    if source == "latents":
        words = "--vae tiny-f2d4 --data digits --split test --resolution 16 --workers 0"
        assert run_here("scripts/cache_latents.py", *words.split(), "--out", folder) == 0
        return
    import h5py

    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), "u1")
    if source == "packed":
        for i, image in enumerate(pixels):
            path = folder.parent / "pictures" / str(i % 2) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        words = ["--resolution", "16", "--workers", "0"]
        code = run_here("scripts/prepare_data.py", folder.parent / "pictures", folder, *words)
        assert code == 0
        return
    folder.mkdir()
    names = [f"{i:08d}.png" for i in range(16)]
    with h5py.File(folder / "images.h5", "w") as file:
        for name, image in zip(names, pixels):
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "PNG")
            file[name] = np.frombuffer(stream.getvalue(), "u1")
    (folder / "images_h5.json").write_text(json.dumps(names))
    labels = [[name, i % 2] for i, name in enumerate(names)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_pictures_of_other_formats_reach_no_decoder(tmp_path, capsys):
    """An EPS that is named .png would be handed to Ghostscript, a program."""
    mark = tmp_path / "executed"
    for label in "01":
        (tmp_path / "src" / label).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "src" / label / "good.png")
    eps(tmp_path / "src" / "0" / "bad.png", mark)
    command = ["evaluate_fid.py", "--samples", tmp_path / "src", "--reference", "digits:test@16"]
    command += ["--features", "pixel", "--cache", "none"]
    require_refusal(command, mark, capsys, "folder of samples")
    data = ["data.source=folder", f"data.path={tmp_path / 'src'}", "data.max_bad_images=0"]
    words = [*TRAIN, f"run.out={tmp_path}", "run.batch_size=2", *data]
    require_refusal(words, mark, capsys, "folder of training images")


def test_a_classifier_that_is_none(tmp_path):
    from models.checks.errors import UserError
    from utils.paper import classifier

    mark = tmp_path / "executed"
    for kind in HOSTILE:
        file = hostile(kind, tmp_path / "judge.safetensors", mark)
        with pytest.raises(UserError):
            classifier.load(file)
        assert not mark.exists()
