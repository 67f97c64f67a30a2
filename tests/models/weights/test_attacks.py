"""Files that are made to do harm: nothing in them is executed or imported, the memory and the time
they take are bounded, and what is said of them is one line."""

import io
import pickle
import random
import struct
import sys
import tracemalloc
import warnings
import zipfile

import pytest
import torch

from models.checks.errors import UserError
from models.weights import pickles
from models.weights.pickles import Placeholder, read_pickle
from models.weights.reading import read_plain, read_state
from tests.weight_files import Bomb, archive, message, tensor

P = b"\x80\x02"
ORDERED = b"ccollections\nOrderedDict\n"


def refuse(path, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_plain(path)
    assert str(path) in message(caught)


# ---------------------------------------------------------------- code

CODE = {
    "reduce": b"cos\nmkdir\n(X%sR.",
    "reduce of two": b"ccopy_reg\n_reconstructor\n(cos\nmkdir\nc__builtin__\nobject\nNtR.",
    "newobj": b"cos\nmkdir\n(X%s\x81.",
    "rebuild": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nmkdir\nN(X%sN tR.".replace(b" ", b""),
    "nested name": b"cthis\ns.mkdir\n)R.",
    "getattr": b"c__builtin__\ngetattr\n(cos\npath\nX\5\0\0\0mkdirtR(X%sR.",
    "build": b"cos\nPathLike\n)\x81}X\x0c\0\0\0__setstate__cos\nmkdir\nsb.",
    "dict of an object": b"cos\n_Environ\n)\x81X\1\0\0\0aX\1\0\0\0bs.",
    "list of an object": b"cos\n_wrap_close\n)\x81X\1\0\0\0aa.",
}


@pytest.mark.parametrize("how", CODE)
def test_nothing_is_called_or_imported_by_whatever_operation(how, tmp_path):
    mark = str(tmp_path / "executed").encode()
    argument = struct.pack("<I", len(mark)) + mark + b"t"
    code = CODE[how].replace(b"%s", argument)
    found = read_pickle(io.BytesIO(P + code), {}, pickle.loads)
    assert isinstance(found, Placeholder)
    assert not (tmp_path / "executed").exists() and "this" not in sys.modules
    with pytest.raises(UserError, match="do not fit") as caught:
        read_state(archive(tmp_path / "w.pt", P + code), known=("a",))
    message(caught)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("old", [False, True])
def test_a_bomb_beside_the_network_does_not_go_off(old, tmp_path):
    content = {"model": {"a": torch.ones(2)}, "args": Bomb(tmp_path / "executed")}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    assert read_state(tmp_path / "w.pt", known=("a",))["a"].sum() == 2
    content = {"model": {"a": torch.ones(2), "b": content["args"]}}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(UserError, match="neither a state dict"):
        read_state(tmp_path / "w.pt")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert (tmp_path / "executed").exists()  # the file was a real one


# ---------------------------------------------------------------- sizes

SHAPES = {
    "one more": (tensor((11,)), "beyond its storage"),
    "one later": (tensor(offset=1), "beyond its storage"),
    "far apart": (tensor((2,), (2**40,)), "beyond its storage"),
    "backwards": (tensor((2,), (-1,), 1), "without a shape"),
    "negative": (tensor((-1,)), "without a shape"),
    "in quarters": (tensor((2.5,)), "without a shape"),
    "of texts": (tensor(("a",)), "without a shape"),
    "two strides": (tensor((2,), (1, 1)), "without a shape"),
    "many sides": (tensor((1,) * 65, (1,) * 65), "without a shape"),
    "no tuple": (tensor(3), "without a shape"),
    "far offset": (tensor((2,), offset=2**80), "without a shape"),
    "huge storage": (tensor((2,), numel=2**60), "none of PyTorch's"),
    "a little more": (tensor((2,), numel=11), "cut short"),
    "of eight bytes": (tensor((2,), storage="DoubleStorage"), "cut short"),
    "no number": (tensor((2,), numel="x"), "none of PyTorch's"),
    "other file": (tensor(key="../../../etc/passwd"), "cut short"),
    "version": (tensor(key="../version"), "cut short"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_a_tensor_is_inside_of_its_own_storage(what, tmp_path):
    pickled, words = SHAPES[what]
    refuse(archive(tmp_path / "w.pt", pickled), words)


IDS = (None, 5, "s", (), ("storage",), ("storage", 1, 2, 3), ("storage", 1, "0", "cpu", 10),
       ("storage", "x", "0", "cpu", 10), ["storage"], ("module", 1, 2, 3))  # fmt: skip


@pytest.mark.parametrize("given", IDS, ids=str)
def test_a_persistent_id_of_another_shape_is_refused(given, tmp_path):
    pickled = pickle.dumps(given, 2)[:-1] + b"Q."
    refuse(archive(tmp_path / "w.pt", pickled), "none of PyTorch's")
    torch.save({}, path := tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"\x80\x02}q\0.", pickled))
    refuse(path, "none of PyTorch's")


def test_old_files_whose_numbers_lie_elsewhere_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    count = struct.pack("<q", 3)
    assert whole.count(count) == 1
    for other in (b"\xff" * 8, struct.pack("<q", 4), struct.pack("<q", 2), struct.pack("<q", -1)):
        path.write_bytes(whole.replace(count, other))
        refuse(path, "cut short")
    for cut in (1, 20, len(whole) - 1, len(whole) - 13, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError) as caught:
            read_plain(path)
        message(caught)


# ---------------------------------------------------------------- archives


def test_an_archive_is_read_as_pytorch_writes_it_or_not_at_all(tmp_path):
    path = tmp_path / "w.pt"
    refuse(archive(path, tensor(), compression=zipfile.ZIP_DEFLATED), "compressed or encrypted")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(archive(path, tensor()), "a") as file:
            file.writestr("archive/data/0", bytes(40))
    refuse(path, "two files of one name")
    with zipfile.ZipFile(archive(path, tensor()), "a") as file:
        file.writestr("other/data.pkl", b"N.")
    refuse(path, r"no data\.pkl")
    whole = archive(path, tensor()).read_bytes()
    for damaged in (whole[:-9], whole[:200], bytes(300), whole.replace(b"PK\3\4", b"PK\3\5")):
        path.write_bytes(b"PK\3\4" + damaged[4:])
        refuse(path, "damaged")


def test_numbers_are_not_copied_more_often_than_the_file_holds_them(tmp_path):
    """A directory may name the same bytes often: 1,000 names for a megabyte are a gigabyte."""
    path, size, names = tmp_path / "w.pt", 2**16, 100
    keys = [tensor((9,), numel=size // 4 - i, key=f"{i}")[2:-1] for i in range(names)]
    pickled = P + b"(" + b"".join(keys) + b"l."
    while True:  # until the numbers begin at an odd place
        with zipfile.ZipFile(archive(path, pickled, bytes(size)), "a") as file:
            first = file.getinfo("archive/data/0")
            for i in range(1, names):
                info = zipfile.ZipInfo(f"archive/data/{i}")
                info.header_offset, info.CRC = first.header_offset, 0
                info.file_size = info.compress_size = size - 4 * i
                file.filelist.append(info)
            file.comment = b"changed"  # else nothing of this is written
        if (first.header_offset + 30 + len("archive/data/0")) % 16:
            break
        pickled = pickled[:-1] + b"N0."
    refuse(path, "tensors are larger than the file")


# ---------------------------------------------------------------- pickles

MARK = b"(X\1\0\0\0a"
BOMBS = {
    # operations that would take memory by the number that they name
    "memo": (P + b"]r\xff\xff\xff\x7f.", None),
    "bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"abc.", "damaged"),
    "text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.", "damaged"),
    "number": (P + b"\x8b" + struct.pack("<i", 2**30) + b"abc.", "damaged"),
    "digits": (b"L" + b"9" * 5000 + b"L\n.", "damaged"),
    # registered names, and instances of protocol 0
    "extension": (P + b"\x82\1.", "operation EXT1"),
    "extension 4": (P + b"\x84\1\0\0\0.", "operation EXT4"),
    "instance": (b"(S'x'\nios\nsystem\n.", "operation INST"),
    "object": (b"(cos\nsystem\nS'x'\no.", "operation OBJ"),
    "text id": (b"Pabc\n.", "operation PERSID"),
    "buffer": (b"\x80\x05\x97.", "operation NEXT_BUFFER"),
    # containers that are none
    "call of a text": (P + b"X\1\0\0\0a)R.", "uses a str as a class"),
    "append to a number": (P + b"K\1K\2a.", "uses a int as a list"),
    "no stack": (P + b"0.", "damaged"),
    "no mark": (P + b"u.", "damaged"),
    "a key alone": (P + b"}(K\1u.", "key without a value"),
    "no end": (P + b"]", "damaged"),
    # depth: hashing, comparing or freeing it may end the process
    "deep list": (P + b"]" * 50_000 + b"a" * 49_999 + b".", None),
    "deep key": (P + b"})" + b"\x85" * 50_000 + b"Ns.", None),
    "deep dict": (P + (b"}X\1\0\0\0a") * 20_000 + b"N" + b"s" * 20_000 + b".", None),
    "laughs": (P + b"]q\0" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(200)) + b".",
               None),
    "itself": (P + b"comegaconf.listconfig\nListConfig\n)\x81q\0}X\x08\0\0\0_contenth\0sb.", None),
}  # fmt: skip


@pytest.mark.parametrize("how", BOMBS)
def test_a_pickle_that_is_a_bomb_is_refused_or_harmless(how, tmp_path):
    pickled, words = BOMBS[how]
    path = archive(tmp_path / "w.pt", pickled)
    with pytest.raises(UserError, match=words or "do not fit") as caught:
        read_state(path, known=("a",))
    assert str(path) in message(caught)


MANY = b"h\1h\0\x85R" * 300 + b"t."  # calls of the memo's second item with its first
STATE = b"}(" + b"".join(b"J%sN" % struct.pack("<i", i) for i in range(300)) + b"u"
COPIES = {
    "dicts": P + ORDERED + b"q\1](" + b"(K\1K\2t" * 300 + b"eq\0(" + MANY,
    "sets": P + b"c__builtin__\nset\nq\1](" + b"K\1" * 300 + b"eq\0(" + MANY,
    "bytes": P + b"c_codecs\nencode\nq\1X\0\0\4\0" + b"a" * 2**18 + b"q\0(" + MANY,
    "states": P + b"cargparse\nNamespace\nq\1" + STATE + b"q\0(" + b"h\1)\x81h\0b" * 300 + b"t.",
    "tensors": P + b"(" + tensor()[2:-2] + b"q\0" + b"ctorch._utils\n_rebuild_tensor_v2\nq\1"
               + b"h\1h\0R" * 3000 + b"t.",
    "operations": P + b"\x8f" * 20_001 + b".",
}  # fmt: skip


@pytest.mark.parametrize("what", COPIES)
def test_what_a_pickle_can_make_is_bounded(what, tmp_path, monkeypatch):
    """A few bytes that copy a large object again and again. With fewer operations."""
    monkeypatch.setattr(pickles, "MOST", 20_000)
    path = archive(tmp_path / "w.pt", COPIES[what])
    tracemalloc.start()
    refuse(path, "more than 20,000 operations")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_long_names_are_not_put_together_again_and_again(tmp_path):
    long = b"X\x10\x27\0\0" + b"a" * 10_000
    refuse(archive(tmp_path / "w.pt", b"\x80\x04" + long + b"q\0" + b"h\0\x93."), "without a name")


def test_random_damage_is_one_line(tmp_path):
    """Bytes changed, left out and repeated, in files of each format."""
    rng = random.Random(0)
    content = {"state_dict": {"module.w": torch.randn(3, 4)}, "h": torch.randn(3).bfloat16()}
    wholes = []
    for name, old in (("new.pt", False), ("old.pt", True)):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not old)
        wholes.append((tmp_path / name).read_bytes())
    path, taken, longest, lines = tmp_path / "w.pt", 0, "", False
    for _ in range(200):
        damaged = bytearray(rng.choice(wholes))
        at, end = rng.randrange(min(600, len(damaged))), rng.randrange(30)
        change = rng.randrange(3)
        if change == 0:
            damaged[at] = rng.choice((rng.randrange(256), 255, *b"R)hq\x81"))
        elif change == 1:
            del damaged[at : at + end]
        else:
            damaged[at:at] = damaged[at // 2 : at // 2 + end]
        path.write_bytes(damaged)
        try:
            read_state(path, known=("w",), tell=lambda line: None)
            taken += 1
        except UserError as error:
            longest = max(longest, str(error), key=len)
            lines |= "\n" in str(error)
    assert 0 < taken < 200 and not lines and len(longest) < 900
