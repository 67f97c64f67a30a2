"""What weight files hold, equal to what PyTorch reads, and what is said of any other file."""

import argparse
import json
import os
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.checks.errors import UserError
from models.weights.pickles import Placeholder
from models.weights.published import WeightFile
from models.weights.reading import read_plain, read_state
from tests.weight_files import Bomb, message, rewritten


def require_equal(found, expected) -> None:
    """Equal in types, order, shapes, strides and bits, however deep."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor) and found.dtype == expected.dtype
        assert (found.shape, found.stride()) == (expected.shape, expected.stride())
        assert found.storage_offset() == expected.storage_offset()
        bits = [t.detach().reshape(-1).view(torch.uint8) for t in (found, expected)]
        assert torch.equal(*bits)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            require_equal(found[key], value)
    elif isinstance(expected, torch.dtype):
        assert found.name == str(expected)
    else:
        assert type(found) is type(expected) and found == expected


def everything(old: bool = False) -> dict:
    """Tensors of all types, views, and values of all kinds that PyTorch reads as weights."""
    numbers = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).mul(9).abs()
    types = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64"
    types += "" if old else " float8_e4m3fn float8_e5m2 uint16"
    state = OrderedDict((name, numbers.to(getattr(torch, name))) for name in types.split())
    state |= {"view": numbers.T, "part": numbers[1:5:2, 2:7:3], "empty": torch.zeros(0, 4)}
    state |= {"scalar": torch.tensor(3.0), "parameter": nn.Parameter(numbers.clone())}
    values = [1, 2.5, "x", None, True, 2**80, -5, (1, 2)]
    content = {"state": state, "epoch": 3, "values": values, 5: {"step": torch.ones(())}}
    return content | {"dtype": torch.float16, "norm": nn.BatchNorm1d(3).state_dict()}


@pytest.mark.parametrize("old", [False, True])
def test_all_that_pytorch_reads_is_read_and_equal_to_the_bit(old, tmp_path):
    path = tmp_path / "w.bin"
    torch.save(everything(old), path, _use_new_zipfile_serialization=not old)
    expected = torch.load(path, weights_only=True)
    found = read_plain(path)
    require_equal(found, expected)
    view, whole = found["state"]["view"], found["state"]["float32"]
    assert view.data_ptr() == whole.data_ptr()  # they share their numbers, as they did
    torch.save(everything(old), path, pickle_protocol=4, _use_new_zipfile_serialization=not old)
    require_equal(read_plain(path), expected)


def test_numbers_of_a_machine_of_the_other_byte_order(tmp_path):
    state = {"a": torch.randn(5, 3), "b": torch.randn(4).half(), "c": torch.arange(5)}
    torch.save(state, tmp_path / "w.pt")
    sizes = {f"{i}": value.itemsize for i, value in enumerate(state.values())}

    def swap(name: str, content: bytes) -> bytes:
        size = sizes.get(Path(name).name) if "/data/" in name else None
        if size:
            steps = range(0, len(content), size)
            return b"".join(content[i : i + size][::-1] for i in steps)
        return b"big" if name.endswith("byteorder") else content

    path = rewritten(tmp_path / "w.pt", swap)  # nor do its numbers begin at multiples of 64
    require_equal(read_plain(path), state)
    require_equal(torch.load(path, weights_only=True), state)


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model"])
def test_a_state_dict_is_read_bare_or_wrapped(tmp_path, wrapper):
    state = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.float16)}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.ckpt")
    save_file(state, tmp_path / "w.safetensors")
    for name in ("w.ckpt", "w.safetensors"):
        require_equal(read_state(tmp_path / name), state)


def test_a_file_is_told_by_its_content_not_by_its_name(tmp_path):
    state = {"a": torch.arange(3.0)}
    save_file(state, tmp_path / "w.pt")
    torch.save(state, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        assert torch.equal(read_state(tmp_path / name)["a"], state["a"])


@pytest.mark.parametrize("old", [False, True])
def test_objects_of_any_class_are_inert_and_the_tensors_beside_them_are_taken(
    old, tmp_path, monkeypatch
):
    """Lightning's callbacks, settings, NumPy's numbers, a path, a whole module, and a bomb."""
    module = types.ModuleType("lightning_like")
    kind = type("Checkpointing", (), {"__module__": module.__name__})
    monkeypatch.setattr(module, "Checkpointing", kind, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    args = argparse.Namespace(name="x", inner=argparse.Namespace(lr=0.1))
    content = {"state_dict": {"a": torch.ones(2)}, "args": args}
    content["callbacks"] = {kind: {"best": 0.1}, "one": kind()}
    content |= {"best": np.float64(3), "path": Path("x"), "net": nn.Linear(2, 1)}
    content["bomb"] = Bomb(tmp_path / "executed")
    torch.save(content, tmp_path / "w.ckpt", _use_new_zipfile_serialization=not old)
    monkeypatch.delitem(sys.modules, module.__name__)
    found = read_plain(tmp_path / "w.ckpt")
    assert not (tmp_path / "executed").exists() and module.__name__ not in sys.modules
    assert found["args"] == {"name": "x", "inner": {"lr": 0.1}}
    assert found["bomb"].name in ("posix.mkdir", "nt.mkdir") and len(found["bomb"].content) == 1
    assert {type(found[key]) for key in ("best", "path", "bomb", "net")} == {Placeholder}
    (key, *_), one = found["callbacks"], found["callbacks"]["one"]
    assert key.name == one.name == "lightning_like.Checkpointing"
    require_equal(read_state(tmp_path / "w.ckpt"), {"a": torch.ones(2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said that the user can do nothing about
        net = read_state(tmp_path / "w.ckpt", known=("weight",), tell=lambda line: None)
    require_equal(net, dict(content["net"].state_dict()))


def test_settings_of_omegaconf_are_plain_dicts_and_lists(tmp_path, monkeypatch):
    """The classes by their names and states, as OmegaConf 2 pickles them."""
    modules = {name: types.ModuleType(name) for name in ("omegaconf.dictconfig",
               "omegaconf.listconfig", "omegaconf.nodes", "omegaconf")}  # fmt: skip
    kinds = {}
    for module, name in (("dictconfig", "DictConfig"), ("listconfig", "ListConfig"),
                         ("nodes", "AnyNode")):  # fmt: skip
        kind = type(name, (), {"__module__": f"omegaconf.{module}"})
        setattr(modules[f"omegaconf.{module}"], name, kind)
        kinds[name] = kind

    def make(name: str, parent, **state):
        made = kinds[name]()
        made.__dict__ |= {"_parent": parent, "_metadata": kinds["AnyNode"](), **state}
        return made

    outer = make("DictConfig", None)
    items = make("ListConfig", outer, _content=[make("AnyNode", outer, _val=v) for v in (1, "x")])
    outer.__dict__["_content"] = {"lr": make("AnyNode", outer, _val=0.1), "items": items}
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        torch.save({"cfg": outer}, tmp_path / "w.ckpt")
    assert read_plain(tmp_path / "w.ckpt")["cfg"] == {"lr": 0.1, "items": [1, "x"]}


def test_modules_of_torchscript_are_nested_dicts(tmp_path, monkeypatch):
    """As torch.jit.save pickles them; backbones/test_layouts.py reads a whole archive."""
    module = types.ModuleType("__torch__")
    kind = type("Module", (), {"__module__": "__torch__"})
    monkeypatch.setattr(module, "Module", kind, raising=False)
    monkeypatch.setitem(sys.modules, "__torch__", module)
    linear, net, state = kind(), kind(), nn.Linear(2, 3).state_dict()
    vars(linear).update(state, training=True, _is_full_backward_hook=None)
    vars(net).update({"0": linear, "scale": torch.ones(())})
    torch.save(net, tmp_path / "net.pt")
    found = read_plain(tmp_path / "net.pt")
    assert found["0"]["training"] is True
    expected = {"scale": torch.ones(()), **{f"0.{name}": value for name, value in state.items()}}
    require_equal(dict(sorted(read_state(tmp_path / "net.pt", known=("0.bias",)).items())),
                  dict(sorted(expected.items())))  # fmt: skip


def test_what_was_taken_is_said_on_one_rank(tmp_path, monkeypatch, capsys):
    torch.save({"ema": {"module.a": torch.ones(2)}, "step": 3}, tmp_path / "w.pt")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        read_state(tmp_path / "w.pt", known=("a",))
        said = "w.pt: weights taken from ema, without the prefix module.\n" if rank == "0" else ""
        text = capsys.readouterr().out
        assert text.endswith(said) and bool(text) == bool(said)


# ---------------------------------------------------------------- shards


def write_shards(folder: Path, names: dict[str, str]) -> Path:
    save_file({"a": torch.ones(2)}, folder / "1.safetensors")
    torch.save({"b": torch.zeros(3), "spare": torch.ones(1)}, folder / "2.bin")
    index = folder / "w.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": names}))
    return index


def test_an_index_gives_the_tensors_of_all_its_shards(tmp_path):
    index = write_shards(tmp_path, {"b": "2.bin", "a": "1.safetensors"})
    require_equal(read_state(index), {"a": torch.ones(2), "b": torch.zeros(3)})


WRONG_INDICES = {
    "absent": ({"a": "3.bin"}, "names '3.bin', which is no shard beside it"),
    "outside": ({"a": "../1.safetensors"}, "which is no shard beside it"),
    "below": ({"a": "x/../1.safetensors"}, "which is no shard beside it"),
    "up": ({"a": ".."}, "which is no shard beside it"),
    "itself": ({"a": "w.safetensors.index.json"}, "which is no shard beside it"),
    "no name": ({"a": 3}, "damaged index"),
    "no map": ([["weight_map"]], "damaged index"),
    "another": ({"c": "2.bin"}, "lacks c, which .* names"),
}


@pytest.mark.parametrize("why", WRONG_INDICES)
def test_an_index_that_names_what_is_not_there_is_refused(why, tmp_path):
    names, words = WRONG_INDICES[why]
    index = write_shards(tmp_path, names)
    with pytest.raises(UserError, match=words) as caught:
        read_state(index)
    message(caught)


# ---------------------------------------------------------------- what is no weight file


def truncate(path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def keras(path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("metadata.json", "{}")
        file.writestr("model.weights.h5", b"")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"
OTHERS = {
    "text": (lambda path: path.write_text("import this"), "a text file"),
    "pointer": (lambda path: path.write_text(POINTER), r"a pointer of Git LFS .*git lfs pull"),
    "page": (lambda path: path.write_text("\n<!DOCTYPE html><p>"), "an HTML page.*login"),
    "gguf": (lambda path: path.write_bytes(b"GGUF\3" + bytes(99)), "a GGUF file.*safetensors"),
    "onnx": (lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch" + bytes(9)), "an ONNX file"),
    "flax": (lambda path: path.write_bytes(b"\x81\xa6params\x82\xa3abc" + bytes(range(128, 255))),
             "a MessagePack file"),
    "keras": (keras, "a Keras file"),
    "npz": (lambda path: np.savez(path.open("wb"), a=np.ones(2)), "a NumPy archive"),
    "cut": (truncate, "a PyTorch file, and it is cut short"),
    "zeros": (lambda path: path.write_bytes(bytes(64)), "a binary file of no known kind"),
    "pickle": (lambda path: path.write_bytes(b"\x80\x04N."), "a Python pickle.* torch.save"),
    "no dict": (lambda path: torch.save([1, 2], path), "neither a state dict.*list"),
    "numbers": (lambda path: torch.save({"epoch": 3}, path), "neither a state dict.*epoch"),
    "empty": (lambda path: path.touch(), "an empty file"),
    "folder": (lambda path: path.mkdir(), "a folder"),
    "fifo": (lambda path: os.mkfifo(path), "a FIFO"),
    "link to nothing": (lambda path: path.symlink_to("nowhere"), "a link to nothing"),
    "loop": (lambda path: path.symlink_to(path), "symbolic links"),
    "absent": (lambda path: None, "no such file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_weight_file_is_named_in_one_line_and_never_waited_for(kind, tmp_path):
    path = tmp_path / "w.pt"
    make, words = OTHERS[kind]
    make(path)
    with pytest.raises(UserError, match=words) as caught:
        read_state(path)
    assert str(path) in message(caught)
    if kind in ("folder", "fifo", "link to nothing", "loop", "absent"):
        with pytest.raises(UserError, match=words):
            WeightFile("w.pt", path=path).find()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**9),
        torch.zeros(3).to_sparse(),
        torch.empty(3, device="meta"),
        torch.ones(2, dtype=torch.complex64).conj(),
    ],
)
def test_tensors_without_stored_numbers_are_refused(tmp_path, tensor):
    torch.save({"a": tensor, "b": torch.ones(1)}, tmp_path / "w.pt")
    for known, words in (((), "neither a state dict"), (("b",), "tensor a is not stored")):
        with pytest.raises(UserError, match=words):
            read_state(tmp_path / "w.pt", known)


def test_only_what_is_used_is_read(tmp_path):
    """The moments of optimizers are most of a checkpoint."""
    torch.save({"ema": {"a": torch.ones(9)}, "opt": torch.ones(9)}, path := tmp_path / "w.pt")
    found = read_state(path, known=("a",), tell=lambda line: None)["a"]
    at = path.read_bytes().index(np.ones(9, np.float32).tobytes())
    with path.open("r+b") as file:
        file.seek(at)
        file.write(np.float32(7).tobytes())
    assert found[0] == 7
    found[0] = 8  # the file is never written
    assert read_plain(path)["ema"]["a"][0] == 7
