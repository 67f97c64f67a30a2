"""The perceptual distance in the features of any network: its formula, its size, its file.

python -m pytest tests/models/test_perceptual_net.py
"""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from loss.reconstruction import perceptual_loss
from models.checks.errors import UserError
from models.lpips import load_perceptual_net, perceptual_weight_file
from tests.tiny import tiny_config, train_here
from utils.doctor.weights import needed_files
from utils.files import read_json_lines
from utils.training.networks import load_perceptual, skeleton
from utils.training.plan import unread_files, weight_checks

SPEC = "timm:test_resnet@random"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Weights as scripts/train_classifier.py writes them, for images of 32 px."""
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    path = tmp_path_factory.mktemp("net") / "mine@home.safetensors"
    save_file(state, path, metadata={"classifier": json.dumps({"size": 32})})
    return path


def images(num=2, side=16):
    return torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(num)) * 2 - 1


def test_it_is_the_literal_formula_of_lpips_with_weights_of_one(file):
    x, y = images(2), images(3)[:2]
    net = timm.create_model("test_resnet", num_classes=10).eval()
    found = load_perceptual_net(f"timm:test_resnet@{file}", 16, 32)
    net.load_state_dict(found.encoder.net.state_dict(), strict=False)
    mean, std = (torch.tensor(net.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    stages = []
    for image in (x, y):
        fed = F.interpolate(((image + 1) / 2 - mean) / std, (32, 32), mode="bicubic")
        stages.append(net.forward_intermediates(fed, intermediates_only=True))
    expected = 0
    for a, b in zip(*stages):
        a, b = (f / f.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-6) for f in (a, b))
        expected = expected + (a - b).square().sum(dim=1).mean() / len(stages[0])
    assert expected > 1e-3 and perceptual_loss(found, x, x).item() == 0
    of_01 = found(x / 2 + 0.5, y / 2 + 0.5, normalize=True).mean()
    for value in (perceptual_loss(found, x, y), of_01):
        assert value.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_it_is_frozen_and_its_gradient_is_finite_also_for_black_images(name):
    net = load_perceptual_net(f"timm:{name}@random", 40)
    assert net.side == (32 if name == "test_vit" else 40)  # whole patches of 16 px
    net.train()
    assert not any(m.training for m in net.encoder.modules())
    x_hat = torch.full((2, 3, 40, 40), -1.0, requires_grad=True)
    perceptual_loss(net, x_hat, images(2, 40)).backward()
    assert x_hat.grad.isfinite().all() and x_hat.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def test_a_file_of_train_classifier_is_fed_at_its_size_and_others_at_the_images(file):
    words = ("loss.reg.perceptual=1", f"loss.reg.perceptual_net=timm:test_resnet@{file}")
    assert load_perceptual(tiny_config(*words)).side == 32
    assert skeleton(tiny_config(*words), 10).perceptual.side == 32
    assert load_perceptual(tiny_config(words[0], f"loss.reg.perceptual_net={SPEC}")).side == 16
    assert load_perceptual(tiny_config(words[1])) is None and skeleton(tiny_config(), 10)


def test_a_file_is_looked_for_before_the_run_and_nothing_is_named_in_vain(file):
    words = ["loss.reg.perceptual=1", "loss.reg.perceptual_net=timm:test_resnet@{}"]
    missing = tiny_config(words[0], words[1].format("none.safetensors"))
    (check,) = [fit for name, fit in weight_checks(missing, None) if name == "perceptual"]
    with pytest.raises(UserError, match=r"perceptual_net=.*: no such file.*loss.reg.perceptual=0"):
        check()
    here = tiny_config(words[0], words[1].format(file))
    [fit() for name, fit in weight_checks(here, None) if name == "perceptual"]
    (found,) = [find for find in needed_files(here, None) if find[0] == "perceptual"]
    assert found[1](found[2]).find() == file
    assert unread_files(tiny_config(words[1].format(file))) == ["loss.reg.perceptual_net"]
    published = perceptual_weight_file("timm:resnet18.a1_in1k")
    assert published.repo == "timm/resnet18.a1_in1k" and perceptual_weight_file(SPEC) is None


def test_a_weight_without_a_network_and_a_network_that_is_none_are_refused(file):
    with pytest.raises(UserError, match=r"loss.reg.perceptual=1.0 needs a network"):
        tiny_config("loss.reg.perceptual=1")
    with pytest.raises(UserError, match=r"unknown encoder timm:test_resnett: .*test_resnet"):
        load_perceptual_net("timm:test_resnett@random", 16)
    with pytest.raises(UserError, match="not fit timm:test_vit"):
        load_perceptual_net(f"timm:test_vit@{file}", 32)


@pytest.mark.slow
def test_a_run_logs_the_term_and_goes_on_with_it(tmp_path):
    words = ("loss.reg.perceptual=0.5", f"loss.reg.perceptual_net={SPEC}", "run.save_every=2")
    assert train_here(tmp_path / "whole", *words) == 0
    assert train_here(tmp_path / "cut", *words, "run.steps=2") == 0
    assert train_here(tmp_path / "cut", *words) == 0
    rows = [read_json_lines(tmp_path / out / "tiny" / "metrics.jsonl") for out in ("whole", "cut")]
    values = [[row["loss/vae/perceptual"] for row in run] for run in rows]
    assert values[0] == values[1] and len(values[0]) == 2 and min(values[0]) > 0
