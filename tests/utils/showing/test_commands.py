"""The commands at the end of a run name what fits that run.

python -m pytest tests/utils/showing/test_commands.py
"""

import shlex
from pathlib import Path

import pytest
import torch

import evaluate_fid
import sample_ddp
from tests.tiny import tiny_config
from utils.evaluation.options import PUBLISHED
from utils.showing import commands as module
from utils.showing.commands import commands, features, last_words, num_samples, program, reference

IMAGENET = [f"n{number:08d}" for number in range(1_440_764, 1_441_764)]
PACKED = "data.source=packed data.path=/c"
CHECKPOINT = Path("exps/tiny/checkpoints/0400000")


class Images:
    def __init__(self, num: int, classes: list[str]):
        self.num, self.classes, self.num_classes = num, classes, len(classes)

    def __len__(self) -> int:
        return self.num


DIGITS = Images(1797, [*map(str, range(10))])


def words_of(*overrides: str, source=DIGITS) -> tuple[list[str], list[str]]:
    return commands(tiny_config(*overrides), source, CHECKPOINT)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", ["1", "4"])
@pytest.mark.parametrize(
    "overrides",
    [
        "run.precision=bf16",
        "eval.cfg_scale=2.5 eval.features=pixel run.out=/tmp/a'folder",
        "eval.features=timm:test_resnet@a/b.safetensors eval.reference=a.npz",
    ],
)
def test_each_printed_command_is_understood_by_its_program(overrides, ranks, monkeypatch):
    """As a shell reads it, quotes and all."""
    monkeypatch.setenv("WORLD_SIZE", ranks)
    config = tiny_config(*overrides.split())
    printed = last_words(config, DIGITS, CHECKPOINT)  # type: ignore[arg-type]
    lines = [shlex.split(line) for line in printed.splitlines() if line.startswith("    ")]
    for words, parse in zip(lines, (sample_ddp.parse_args, evaluate_fid.parse_args), strict=True):
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        alone = words[:start] == ["python"]
        assert alone or words[:start] == shlex.split(
            "accelerate launch --multi_gpu --num_processes 4"
        )
        assert alone == (ranks == "1") and parse(words[start + 1 :])
    args = evaluate_fid.parse_args(words[start + 1 :])
    evaluate_fid.check_args(args)
    evaluate_fid.read_options(args)


def test_flags_follow_the_settings_of_the_run():
    sample, evaluate = map(" ".join, words_of("eval.cfg_scale=2.5", "eval.features=pixel"))
    assert "--cfg-scale 2.5" in sample and "--precision fp32" in sample
    assert "--class-balanced" in sample and "--num-samples 500" in sample
    assert "--preset fast" in sample and "--features pixel" in evaluate
    plain = " ".join(words_of("eval.cfg_scale=2.5", "sit.class_dropout_prob=0")[0])
    assert "--cfg-scale" not in plain  # there is no null label


def test_a_cpu_makes_some_hundred_samples(monkeypatch):
    """50,000, or as many as the data has, would take hours or days."""
    for images, classes, num in ((1797, 10, 500), (5, 10, 10), (5000, 1, 500), (60_000, 7, 497)):
        assert num_samples(Images(images, ["x"] * classes)) == num  # type: ignore[arg-type]


@pytest.fixture
def no_inception(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path


def test_samples_are_evaluated_by_a_network_that_the_run_has_at_hand(no_inception):
    """Inception, unless it would have to be downloaded and the encoder is a file."""
    file = no_inception / "encoder.safetensors"
    file.touch()
    own = f"timm:test_resnet@{file}"
    flags, remark = features(tiny_config(f"encoder.weights=[{file}]"))
    assert flags == ["--features", own] and own in remark and "not with published" in remark
    flags, remark = features(tiny_config())  # its encoder is random
    assert flags == ["--download"] and "--features pixel" in remark
    frozen = tiny_config("loss.align.sit=0", "loss.align.vae=0", f"encoder.weights=[{file}]")
    assert features(frozen)[0] == ["--download"]
    place = no_inception / "hub" / "checkpoints" / PUBLISHED["inception"]["name"]
    place.parent.mkdir(parents=True)
    place.touch()
    assert features(tiny_config(f"encoder.weights=[{file}]")) == ([], "")
    printed = last_words(tiny_config(), DIGITS, CHECKPOINT)  # type: ignore[arg-type]
    assert "Inception" not in printed


def test_samples_are_as_many_as_the_data_and_equally_many_of_each_class(monkeypatch):
    monkeypatch.setattr(module, "default_device", lambda: torch.device("cuda"))
    expected = {(1797, 10): 1790, (1_281_167, 1000): 50_000, (5, 10): 10, (60_000, 7): 49_994}
    for (images, classes), num in expected.items():
        assert num_samples(Images(images, ["x"] * classes)) == num  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "source", "name"),
    [
        ("", DIGITS, "digits:all@16"),
        ("data.split=train", DIGITS, "digits:train@16"),
        ("data.source=folder data.path=a/b", DIGITS, "folder:a/b@16"),
        ("data.source=tar data.path=a data.split=train", DIGITS, "tar:a@16,split=train"),
        (f"{PACKED} data.resolution=256", DIGITS, "packed:/c@256"),
        (f"{PACKED} data.resolution=256", Images(9, IMAGENET), "VIRTUAL_imagenet256_labeled.npz"),
        (f"{PACKED} data.resolution=128", Images(9, IMAGENET), "packed:/c@128"),
        ("eval.reference=x.npz", DIGITS, "x.npz"),
    ],
)
def test_the_reference_is_the_data_or_what_papers_take(overrides, source, name):
    assert reference(tiny_config(*overrides.split()), source) == name


def test_programs_lie_beside_the_one_that_trained(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/code/train_repae.py"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # of several machines: each samples alone
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert program("sample_ddp.py")[-2:] == ["8", "/code/sample_ddp.py"]
