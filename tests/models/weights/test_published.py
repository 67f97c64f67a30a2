"""Weight files: found here, fetched, hashed. No network is used."""

import hashlib

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from models.checks.errors import UserError
from models.weights.published import WeightFile
from tests.weight_files import message

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
