"""Feature networks without their weights: random ones, against torch-fidelity and formulas."""

import socket
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from models.backbones.table import EncoderSpec
from models.checks.errors import UserError
from models.weights.published import WeightFile
from tests.published_encoders import SMALL, transformers_state
from tests.random_inception import textures
from utils.evaluation import networks
from utils.evaluation.networks import (
    ADMInception,
    _dinov2,
    hub_pos_embed,
    load_features,
    load_inception,
)
from utils.evaluation.options import PUBLISHED, parse_features
from utils.files import sha256_file


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.slow
def test_inception_features_are_bit_equal_to_torch_fidelity(inception_weights):
    net = load_features(
        "inception", weights=str(inception_weights), weights_sha256=sha256_file(inception_weights)
    )
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(inception_weights)
    )
    x = textures(4, 1)
    found = net(x)
    assert torch.equal(found["pool"], theirs(x)[0])
    assert found["pool"].shape == (4, 2048)
    assert found["spatial"].shape == (4, 17 * 17 * 7)
    assert 0.1 < found["pool"].mean() < 2  # the random network is alive
    assert not net.published
    assert net.label == f"inception#{sha256_file(inception_weights)[:8]}"


@pytest.mark.slow
def test_spatial_features_are_those_of_mixed_6d(inception_weights):
    net, blocks = ADMInception(load_inception(inception_weights)), {}
    for name in ("Mixed_6d", "Mixed_6e"):
        getattr(net.net, name).register_forward_hook(lambda m, i, o, n=name: blocks.update({n: o}))
    spatial = net.features(textures(2, 1))["spatial"].reshape(2, 17, 17, 7).permute(0, 3, 1, 2)
    assert torch.equal(spatial, blocks["Mixed_6d"][:, :7])
    assert not torch.allclose(spatial, blocks["Mixed_6e"][:, :7], atol=0.1)
    assert net.spatial is None  # nothing is kept alive between batches


def test_resize_is_that_of_tensorflow_1():
    x = textures(2, 1, size=48).float()
    out = np.arange(299) * (48 / 299)
    low = np.floor(out).astype(int)
    high, weight = np.minimum(low + 1, 47), out - low
    rows = x.numpy()[:, :, low] * (1 - weight)[:, None] + x.numpy()[:, :, high] * weight[:, None]
    expected = rows[..., low] * (1 - weight) + rows[..., high] * weight
    found = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    half_pixel = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    assert (half_pixel - found).abs().mean() > 0.1


def test_missing_weights_name_file_url_and_hash(tmp_path):
    for family, published in PUBLISHED.items():
        with pytest.raises(UserError) as error:
            load_features(family)
        for part in (*published.values(), str(tmp_path), "--weights", "--download"):
            assert part in str(error.value)


def test_a_download_that_fails_is_not_proposed_again(monkeypatch):
    def refuse(*_):
        raise OSError("no network")

    monkeypatch.setattr(WeightFile, "_download", refuse)
    for spec in (*PUBLISHED, "timm:resnet10t"):
        with pytest.raises(UserError, match="no network") as error:
            load_features(spec, download=True)
        assert "--download" not in str(error.value) and "FILE" in str(error.value)


def test_other_weights_are_refused_before_they_are_unpickled(tmp_path, monkeypatch):
    file = tmp_path / "evil.pth"
    file.write_bytes(b"not the published bytes")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickled"))
    for spec in ("inception", "dinov2"):
        with pytest.raises(UserError, match="expected " + PUBLISHED[spec]["sha256"]):
            load_features(spec, weights=str(file))
    with pytest.raises(UserError, match="has sha256"):
        load_features("inception", weights=str(file), weights_sha256="0" * 64)


def test_nothing_in_a_weight_file_is_executed(tmp_path, monkeypatch):
    """Not even with a hash that the user has vouched for: a pickle would leave a file behind."""

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    file = tmp_path / "evil.pth"
    torch.save({"weight": Evil()}, file)
    for spec in ("inception", "dinov2"):
        with pytest.raises(UserError, match=r"do not fit .* has no tensors"):
            load_features(spec, weights=str(file), weights_sha256=sha256_file(file))
    with pytest.raises(UserError, match=r"do not fit timm's resnet10t"):
        load_features(f"timm:resnet10t@{file}")
    assert not (tmp_path / "executed").exists()


def test_unknown_features_are_refused():
    for spec in ("fid", "timm", "timm:", "inception:x"):
        with pytest.raises(UserError, match="expected inception"):
            parse_features(spec)
    with pytest.raises(UserError, match=r"nearest: .*resnet10t"):
        load_features("timm:resnet10q")


def test_dinov2_position_embedding_is_resampled_as_by_the_hub_code():
    pos = torch.randn(1, 1 + 37 * 37, 8, generator=torch.Generator().manual_seed(0))
    found = hub_pos_embed(pos, 16)
    assert found.shape == (1, 1 + 16 * 16, 8)
    assert torch.equal(found[:, :1], pos[:, :1])
    grid = pos[:, 1:].reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    antialiased = F.interpolate(grid, (16, 16), mode="bicubic", antialias=True)
    other = antialiased.flatten(2).transpose(1, 2)
    assert (found[:, 1:] - other).norm() > 0.05 * other.norm()
    constant = hub_pos_embed(torch.ones(1, 1 + 37 * 37, 8), 16)
    assert torch.allclose(constant, torch.ones_like(constant))


@pytest.mark.slow
def test_dinov2_loads_meta_keys_and_resizes_with_pil(tmp_path):
    name = "vit_small_patch14_dinov2"
    torch.manual_seed(0)
    state = timm.create_model(name, num_classes=0, img_size=518).state_dict()
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, tmp_path / "meta.pth")
    net = _dinov2(tmp_path / "meta.pth", "ab" * 32, torch.device("cpu"), name)
    x = textures(2, 1, size=256)
    feats = net(x)["pool"]
    assert feats.shape == (2, 384)
    assert net.label == "dinov2#abababab"
    rows = [np.asarray(Image.fromarray(i).resize((224, 224), Image.Resampling.BICUBIC))
            for i in x.permute(0, 2, 3, 1).numpy()]  # fmt: skip
    y = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    model = timm.create_model(name, num_classes=0, img_size=224)
    state["pos_embed"] = hub_pos_embed(state["pos_embed"], 16)
    state.pop("mask_token")
    model.load_state_dict(state)
    with torch.no_grad():
        expected = model.eval()((y - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.testing.assert_close(feats, expected)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_timm_checkpoint_with_its_classifier_gives_pooled_features(tmp_path, ending):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10).eval()
    path = tmp_path / f"classifier.{ending}"
    (save_file if ending == "safetensors" else torch.save)(model.state_dict(), path)
    net = load_features(f"timm:resnet10t@{path}")
    x = textures(3, 1, size=32)
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        x_n = (x.float() / 255 - mean) / std
        expected = model.forward_head(model.forward_features(x_n), pre_logits=True)
    torch.testing.assert_close(net(x)["pool"], expected)
    assert net.label == f"timm:resnet10t@{path.name}#{sha256_file(path)[:8]}"
    assert net.facts["resize"] == "none"


def test_a_folder_of_transformers_gives_the_features_of_timms_file(tmp_path, monkeypatch):
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL)
    monkeypatch.setattr(networks, "EncoderSpec", partial(EncoderSpec, kwargs=SMALL))
    save_file(net.state_dict(), own := tmp_path / "timm.safetensors")
    (folder := tmp_path / "hub").mkdir()
    save_file(transformers_state(net, "dinov1-s"), folder / "model.safetensors")
    ours, theirs = (load_features(f"timm:vit_tiny_patch16_224@{file}") for file in (own, folder))
    x = textures(1, 1, size=32)
    assert torch.equal(ours(x)["pool"], theirs(x)["pool"])
    assert theirs.label.startswith("timm:vit_tiny_patch16_224@model.safetensors#")


def test_of_a_training_checkpoint_of_timm_the_averaged_network_is_taken(tmp_path, capsys):
    raw, averaged = (timm.create_model("resnet10t", num_classes=10) for _ in range(2))
    wrapped = {f"module.{name}": value for name, value in averaged.state_dict().items()}
    content = {"state_dict": raw.state_dict(), "state_dict_ema": wrapped, "arch": "resnet10t"}
    torch.save(content, path := tmp_path / "checkpoint.pth.tar")
    net = load_features(f"timm:resnet10t@{path}")
    assert "taken from state_dict_ema, without the prefix module." in capsys.readouterr().out
    save_file(averaged.state_dict(), alone := tmp_path / "averaged.safetensors")
    x = textures(2, 1, size=32)
    assert torch.equal(net(x)["pool"], load_features(f"timm:resnet10t@{alone}")(x)["pool"])


def test_a_classifier_of_ours_is_fed_at_the_size_it_was_trained_at(tmp_path):
    model = timm.create_model("resnet10t", num_classes=10).eval()
    path = tmp_path / "c.safetensors"
    save_file(model.state_dict(), path, metadata={"classifier": '{"size": 64, "seed": 0}'})
    net = load_features(f"timm:resnet10t@{path}")
    x = textures(2, 1, size=16)
    larger = F.interpolate(x.float(), (64, 64), mode="bicubic")
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        x_n = (larger / 255 - mean) / std
        expected = model.forward_head(model.forward_features(x_n), pre_logits=True)
    torch.testing.assert_close(net(x)["pool"], expected)
    assert "64" in net.facts["resize"]


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    sha256 = sha256_file(tmp_path / "other.pth")
    with pytest.raises(UserError, match="do not fit Inception"):
        load_features("inception", weights=str(tmp_path / "other.pth"), weights_sha256=sha256)
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="do not fit"):
        load_features(f"timm:resnet10t@{tmp_path}/other.safetensors")
    with pytest.raises(UserError, match="no such file"):
        load_features("timm:resnet10t@nowhere.pth")
    with pytest.raises(UserError, match="--download"):
        load_features("timm:resnet10t")
    with pytest.raises(UserError, match="timm:NAME@FILE"):
        load_features("pixel", weights="x.pth")


def test_pixel_features_are_averages_of_the_image():
    x = torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
    x[:, 0, :2, :2] = 255
    feats = load_features("pixel")(x)["pool"]
    assert feats.shape == (1, 3 * 12 * 12)
    assert feats[0, 0] == 1
    assert feats.sum() == 1
