"""The command: its flags reach the export. What is exported: tests/utils/published/."""

import pytest

from models.checks.errors import UserError
from scripts import export_vae
from tests.exported_vaes import checkpoint


def run(*words) -> None:
    export_vae.main([str(word) for word in words])


def test_measured_on_a_split_uploaded_under_its_name(tmp_path, monkeypatch, capsys):
    uploads = []
    monkeypatch.setattr(export_vae, "upload", lambda *words: uploads.append(words))
    folder, out = checkpoint(tmp_path / "run", "tiny-f8d4", stats=False), tmp_path / "out"
    words = "--data digits --resolution 16 --split test --num 32 --seed 3 --push-to-hub me/vae"
    run(folder, out, *words.split())
    printed = capsys.readouterr().out
    assert "on 32 images of digits (test split) at 16 px, seed 3" in printed
    assert uploads == [(out, "me/vae")]
    assert "# me/vae\n" in (out / "README.md").read_text()


def test_statistics_of_the_checkpoint_and_a_folder_that_survives_a_failed_upload(
    tmp_path, monkeypatch
):
    def fail(*words):
        raise UserError("offline")

    monkeypatch.setattr(export_vae, "upload", fail)
    folder, out = checkpoint(tmp_path / "run", "tiny-f8d4"), tmp_path / "out"
    with pytest.raises(UserError, match="offline"):
        run(folder, out, "--push-to-hub", "me/vae")
    assert "Taken from the VAE's config" in (out / "README.md").read_text()


def test_flags_that_cannot_be_are_refused(tmp_path):
    for words, message in (
        (["--num", 0], r"--num: .0.: expected a whole number"),
        (["--num", 5], "--num 5 needs --data"),
        (["--data", "mnist"], "invalid choice"),
        (["--evaluation", tmp_path / "absent.json"], "expected the --out of"),
    ):
        with pytest.raises(UserError, match=message):
            run(checkpoint(tmp_path / "run", "tiny-f8d4"), tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
