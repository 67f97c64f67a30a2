"""Weight files: found, fetched, hashed, read, and loaded strictly. No network is used."""

import hashlib
import os

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from models.checks.errors import UserError
from models.weights.configs import read_config
from models.weights.loading import load_strictly
from models.weights.published import WeightFile
from models.weights.reading import read_state

CONTENT = b"so many weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
URL = "https://example.org/net-1234.pth"
BY_URL = WeightFile("net-1234.pth", url=URL, sha256=SHA256, setting="--weights {}")
BY_REPO = WeightFile(
    "w.safetensors",
    repo="someone/net",
    subfolders=("", "vae"),
    companions=("config.json",),
    setting="vae.weights={}",
)


@pytest.fixture
def torch_cache(tmp_path, monkeypatch):
    """torch.hub's folder of downloads, empty."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    return tmp_path / "checkpoints"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The folder in huggingface_hub's cache for one commit of someone/net, without any file."""
    repo, commit = tmp_path / "models--someone--net", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    for module in ("constants", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repo / "snapshots" / commit


def serve(monkeypatch, content: bytes, tmp_path) -> list:
    """Downloads by torch.hub get `content`, whatever the address; returns the addresses asked."""
    asked, real, page = [], torch.hub.download_url_to_file, tmp_path / "served"
    page.write_bytes(content)

    def download(url, target, **kwargs):
        asked.append(url)
        real(page.as_uri(), target, progress=False, **kwargs)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return asked


def message(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and len(text) < 900
    return text


# ---------------------------------------------------------------- files of a URL


def test_a_copy_in_the_cache_is_found_and_not_downloaded(torch_cache, monkeypatch, tmp_path):
    asked = serve(monkeypatch, b"other bytes", tmp_path)
    torch_cache.mkdir()
    assert BY_URL.find() is None
    (torch_cache / "net-1234.pth").write_bytes(CONTENT)
    assert BY_URL.find() == BY_URL.fetch() == torch_cache / "net-1234.pth"
    assert not asked


def test_a_download_lands_in_the_cache_and_only_if_asked_for(torch_cache, monkeypatch, tmp_path):
    asked = serve(monkeypatch, CONTENT, tmp_path)
    with pytest.raises(UserError) as caught:
        BY_URL.fetch(download=False)
    text = message(caught)
    assert not asked and not torch_cache.exists()
    assert all(part in text for part in (str(torch_cache / BY_URL.name), URL, "--weights FILE"))
    assert BY_URL.fetch().read_bytes() == CONTENT
    assert asked == [URL]


def test_a_download_of_other_bytes_is_refused_and_not_kept(torch_cache, monkeypatch, tmp_path):
    """What a captive portal sends."""
    serve(monkeypatch, b"please log in", tmp_path)
    with pytest.raises(UserError, match="invalid hash value"):
        BY_URL.fetch()
    assert not list(torch_cache.iterdir())


def test_without_a_network_the_file_the_places_and_the_remedy_are_named(torch_cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match="no route to host") as caught:
        BY_URL.fetch()
    text = message(caught)
    assert all(part in text for part in (str(torch_cache / BY_URL.name), URL, "--weights FILE"))
    optional = WeightFile("a", url=URL, setting="x={}", otherwise="set loss.reg.lpips=0")
    with pytest.raises(UserError, match=r"give x=FILE, or set loss\.reg\.lpips=0$"):
        optional.fetch()


# ---------------------------------------------------------------- files of a hub repository


def test_a_hub_file_is_found_in_the_first_folder_that_has_all_of_it(hub_cache):
    (hub_cache / "vae").mkdir()
    (hub_cache / "w.safetensors").touch()  # without its config.json
    assert BY_REPO.find() is None
    for name in ("w.safetensors", "config.json"):
        (hub_cache / "vae" / name).touch()
    assert BY_REPO.find() == BY_REPO.fetch() == hub_cache / "vae" / "w.safetensors"


def test_offline_the_hubs_own_reason_is_passed_on(hub_cache):
    with pytest.raises(UserError, match="LocalEntryNotFoundError") as caught:
        BY_REPO.fetch()
    text = message(caught)
    assert "w.safetensors of someone/net not found" in text
    assert str(hub_cache.parents[2]) in text
    assert "`hf download someone/net --local-dir DIR`" in text and "vae.weights=DIR" in text
    alone = WeightFile("w.pt", repo="a/b", subfolders=("vae",), setting="encoder.weights={}")
    assert "`hf download a/b vae/w.pt --local-dir DIR`" in alone.remedy  # not the whole repository
    assert alone.source == "https://huggingface.co/a/b/resolve/main/vae/w.pt"


@pytest.mark.parametrize("absent", [True, False])
def test_the_next_folder_is_tried_only_where_the_hub_says_that_a_file_is_absent(
    hub_cache, monkeypatch, absent
):
    asked = []

    def download(repo, name):
        asked.append(name)
        if not name.startswith("vae/"):
            if absent:
                raise EntryNotFoundError.__new__(EntryNotFoundError)
            raise LocalEntryNotFoundError("no network")
        return str(hub_cache / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    if absent:
        assert BY_REPO.fetch() == hub_cache / "vae/w.safetensors"
        assert asked == ["w.safetensors", "vae/w.safetensors", "vae/config.json"]
    else:
        with pytest.raises(UserError, match="no network"):
            BY_REPO.fetch()
        assert asked == ["w.safetensors"]


# ---------------------------------------------------------------- the user's own file, hashes


def test_a_file_that_the_user_names_is_the_only_one_looked_at(torch_cache, monkeypatch, tmp_path):
    asked = serve(monkeypatch, CONTENT, tmp_path)
    mine = BY_URL.named(tmp_path / "mine.pth")
    for look in (mine.find, mine.fetch):
        with pytest.raises(UserError, match=r"--weights .*mine\.pth: no such file") as caught:
            look()
    assert URL in message(caught) and not asked
    (tmp_path / "mine.pth").write_bytes(b"my own")
    assert mine.fetch() == tmp_path / "mine.pth" == mine.find()
    assert str(mine) == str(tmp_path / "mine.pth")


@pytest.mark.parametrize("known", [SHA256, SHA256[:8], SHA256.upper(), ""])
def test_the_right_hash_is_returned_whole(tmp_path, known):
    (tmp_path / "w").write_bytes(CONTENT)
    assert WeightFile("w", url=URL, sha256=known).check_sha256(tmp_path / "w") == SHA256


def test_a_wrong_hash_names_both_the_source_and_the_way_out(tmp_path):
    (tmp_path / "w").write_bytes(b"other")
    other = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(UserError) as caught:
        BY_URL.check_sha256(tmp_path / "w", "add --weights-sha256 {}")
    text = message(caught)
    assert all(part in text for part in (SHA256, URL, f"--weights-sha256 {other}"))


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model"])
def test_a_state_dict_is_read_bare_or_wrapped(tmp_path, wrapper):
    state = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.float16)}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.ckpt")
    save_file(state, tmp_path / "w.safetensors")
    for name in ("w.ckpt", "w.safetensors"):
        found = read_state(tmp_path / name)
        assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in state.items()}
        assert all(torch.equal(found[k], v) for k, v in state.items())


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD_DIR"],)


def truncate(path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


BAD_FILES = {
    "malicious.pt": lambda path: torch.save({"state_dict": {"a": Payload()}}, path),
    "text.pt": lambda path: path.write_text("404: not found"),
    "truncated.pt": truncate,
    "zeros.safetensors": lambda path: path.write_bytes(b"\0" * 64),
    "numbers.pt": lambda path: torch.save({"epoch": 3}, path),
    "list.pt": lambda path: torch.save([1, 2], path),
    "absent.pt": lambda path: None,
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_no_file_of_tensors_is_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PAYLOAD_DIR", str(tmp_path / "executed"))
    path = tmp_path / name
    BAD_FILES[name](path)
    words = r"not a file of plain tensors|neither a state dict"
    words = "no such file" if name == "absent.pt" else words
    with pytest.raises(UserError, match=words) as e:
        read_state(path)
    assert str(path) in message(e)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", ["{broken", None])
def test_a_config_that_cannot_be_read_is_one_line(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json cannot be read") as caught:
        read_config(tmp_path / "config.json")
    message(caught)


# ---------------------------------------------------------------- loading


def net(device="cpu"):
    with torch.device(device):
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_are_loaded_in_the_networks_own_dtype(device):
    state, loaded = net().state_dict(), net(device)
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    load_strictly(loaded, half, "a file", "the net")
    assert all(torch.equal(v, half[k].to(v.dtype)) for k, v in loaded.state_dict().items())
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {
        k: v.dtype for k, v in state.items()
    }
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_misfit_lists_three_of_each_kind_and_changes_nothing(device):
    loaded, state = net(device), net().state_dict()
    before = {k: v.clone() for k, v in loaded.state_dict().items()}
    del state["0.bias"]
    state |= {"0.weight": torch.zeros(5), **{f"extra.{i}": torch.zeros(1) for i in range(4)}}
    with pytest.raises(UserError) as caught:
        load_strictly(loaded, state, "w.pt", "the net")
    text = message(caught)
    assert "weights of w.pt do not fit the net" in text
    assert "1 missing (0.bias)" in text and "0.weight (5,) for (3, 2)" in text
    assert "4 unexpected (extra.0, extra.1, extra.2, ...)" in text
    if device == "cpu":
        assert all(torch.equal(v, before[k]) for k, v in loaded.state_dict().items())


# ---------------------------------------------------------------- what is there, but not wanted


@pytest.mark.parametrize("kind", ["absent", "empty", "folder", "fifo", "link to nothing", "loop"])
def test_what_is_no_weight_file_is_named_and_never_waited_for(tmp_path, kind):
    path = tmp_path / "w.pt"
    make = {"empty": path.touch, "folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}
    make |= {"link to nothing": lambda: path.symlink_to("nowhere")}
    make |= {"loop": lambda: path.symlink_to(path), "absent": lambda: None}
    make[kind]()
    words = {"loop": "symbolic links", "absent": "absent|no such file", "fifo": "FIFO"}
    for read in (read_state, lambda path: BY_URL.named(path).find() and read_state(path)):
        with pytest.raises(UserError, match=words.get(kind, kind)) as caught:
            read(path)
        message(caught)


def test_a_file_is_told_by_its_content_not_by_its_name(tmp_path):
    state = {"a": torch.arange(3.0)}
    save_file(state, tmp_path / "w.pt")
    torch.save(state, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        assert torch.equal(read_state(tmp_path / name)["a"], state["a"])


STRANGE = {
    "whole numbers": lambda v: v.to(torch.int32),
    "eight bits": lambda v: v.to(torch.float8_e4m3fn),
    "truth values": lambda v: v.bool(),
    "complex": lambda v: v.to(torch.complex64),
    "nan": lambda v: v * float("nan"),
    "too large for float32": lambda v: v.double() * 1e300,
}


@pytest.mark.parametrize("kind", STRANGE)
def test_weights_are_finite_floats(tmp_path, kind):
    """Copied into a network, whole numbers would be taken as they are, and NaN as well."""
    net = nn.BatchNorm1d(3)
    torch.nn.init.ones_(net.bias)
    state = net.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    try:
        save_file(state | {"bias": STRANGE[kind](state["bias"])}, tmp_path / "w.safetensors")
    except KeyError:  # complex ones, before safetensors 0.7
        pytest.skip("this safetensors writes no such numbers")
    with pytest.raises(UserError, match=r"w\.safetensors.*bias") as caught:
        load_strictly(net, read_state(tmp_path / "w.safetensors"), tmp_path / "w.safetensors", "it")
    message(caught)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    load_strictly(net, {k: v.half() if v.is_floating_point() else v for k, v in before.items()},
                  "half", "it")  # fmt: skip


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**9), torch.zeros(3).to_sparse(), torch.empty(3, device="meta")],
)
def test_tensors_without_stored_numbers_are_refused(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"neither a state dict|not a file of plain tensors"):
        read_state(tmp_path / "w.pt")


@pytest.mark.parametrize("content", ["[]", "1", "null", "[" * 10**5, "\0"])
def test_a_config_that_is_no_object_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        read_config(tmp_path / "config.json")
    message(caught)


def test_nobody_is_advised_to_unpickle_what_was_refused(tmp_path):
    (tmp_path / "a.pt").write_text("import this")
    torch.save({"a": nn.Linear(1, 1)}, tmp_path / "b.pt")
    for name, found in (("a.pt", "Unsupported operand"), ("b.pt", "Unsupported global")):
        with pytest.raises(UserError, match=found) as error:
            read_state(tmp_path / name)
        text = str(error.value)
        assert "weights_only" not in text and "add_safe_globals" not in text, text
