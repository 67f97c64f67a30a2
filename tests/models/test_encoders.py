"""The frozen encoders: every row of the table, the authors' file formats, and the arithmetic.

Weights are random: files are made here in the key format that each group of authors publishes.
The networks are cut to one or two blocks, which leaves the code path as it is.
"""

import os
import re
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from models.backbones.table import ENCODERS, HALF, IMAGENET, OPENAI, EncoderSpec
from models.checks.errors import UserError
from models.encoders import encoder_shape, encoder_weight_file, load_encoder

WIDTH = {  # of every row
    "dinov2-s": 384,
    "dinov2-b": 768,
    "dinov2-l": 1024,
    "dinov2-g": 1536,
    "dinov2-reg-s": 384,
    "dinov2-reg-b": 768,
    "dinov2-reg-l": 1024,
    "dinov2-reg-g": 1536,
    "dinov1-s": 384,
    "dinov1-b": 768,
    "dinov3-s": 384,
    "dinov3-b": 768,
    "dinov3-l": 1024,
    "dinov3-h": 1280,
    "mae-b": 768,
    "mae-l": 1024,
    "mae-h": 1280,
    "clip-l": 1024,
    "ijepa-h": 1280,
    "ijepa-h-22k": 1280,
    "siglip2-b": 768,
    "siglip2-l": 1024,
    "siglip2-so400m": 1152,
    "pe-core-b": 768,
    "pe-core-l": 1024,
    "pe-spatial-b": 768,
    "pe-spatial-l": 1024,
    "mocov3-s": 384,
    "mocov3-b": 768,
    "mocov3-l": 1024,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def noisy(net):
    """Random weights in which norms, biases, layer scales and tokens matter too."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return net.eval()


def pictures(side: int, n: int = 1) -> torch.Tensor:
    return torch.rand(n, 3, side, side) * 2 - 1


def normalised(x_pm1, stats, side: int):
    """The preprocessing, written out."""
    mean, std = (torch.tensor(stats[k])[None, :, None, None] for k in ("mean", "std"))
    x = (x_pm1 * 0.5 + 0.5 - mean) / std
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, (side, side), mode="bicubic", align_corners=False)


def stats_of(timm_name: str) -> dict:
    cfg = timm.get_pretrained_cfg(timm_name)
    return {"mean": cfg.mean, "std": cfg.std}


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- the table


@pytest.fixture
def one_block(monkeypatch):
    """Every row with a single block: width, patches and prefix tokens stay what they are."""
    for name, row in ENCODERS.items():
        monkeypatch.setitem(ENCODERS, name, replace(row, kwargs=row.kwargs | {"depth": 1}))


def test_every_row_gives_the_tokens_of_its_grid_in_its_width(one_block):
    assert {name: encoder_shape(name) for name in ENCODERS} == {
        n: (16, d) for n, d in WIDTH.items()
    }


@pytest.mark.parametrize(
    "name", ["dinov2-b", "dinov3-s", "mae-h", "clip-l", "ijepa-h", "pe-core-l"]
)
def test_at_512_pixels_a_side_has_twice_the_tokens(one_block, name):
    assert encoder_shape(name, resolution=512) == (32, WIDTH[name])


def test_mean_and_std_are_those_of_timm_and_each_row_is_published_there():
    for name, spec in ENCODERS.items():
        if name.startswith("mocov3"):  # timm's row of that name has other weights
            continue
        cfg = timm.get_pretrained_cfg(spec.timm_name)
        assert spec.mean == pytest.approx(cfg.mean) and spec.std == pytest.approx(cfg.std)
        assert cfg.hf_hub_id or cfg.url


def test_norm_follows_repa_and_irepa():
    raw = {name for name, spec in ENCODERS.items() if not spec.norm}
    assert raw == {n for n in ENCODERS if n.startswith(("mae", "clip", "pe-"))}


# ---------------------------------------------------------------- behaviour


def test_it_stays_frozen_and_in_eval_mode():
    encoder = load_encoder("timm:test_vit3", "random", resolution=16, grid=8)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    x = pictures(16).requires_grad_()
    feats = encoder(x)
    assert not feats.requires_grad and feats.shape == (1, 64, encoder.embed_dim)
    assert (encoder.name, encoder.grid, encoder.side) == ("timm:test_vit3", 8, 128)


def test_autocast_reaches_the_network_only():
    encoder = load_encoder("timm:test_vit3", "random", resolution=16, grid=8)
    x = pictures(16)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(x)
    torch.testing.assert_close(half.float(), encoder(x), atol=0.2, rtol=0.1)


@pytest.mark.parametrize("classes", [0, 10])
def test_quickstart_network_from_a_local_file(tmp_path, classes):
    net = noisy(timm.create_model("test_vit3", num_classes=classes, img_size=128))
    save_file(net.state_dict(), tmp_path / "teacher.safetensors")
    encoder = load_encoder("timm:test_vit3", tmp_path / "teacher.safetensors", 16, 8)
    x = pictures(16, 2)
    tokens = net.forward_features(normalised(x, stats_of("test_vit3"), 128))
    assert encoder(x).shape == (2, 64, 96)
    close(encoder(x), tokens[:, net.num_prefix_tokens :])
    assert "state_dict" not in encoder.net.pretrained_cfg


def test_a_cnn_gives_its_last_feature_map_as_tokens(tmp_path):
    net = noisy(timm.create_model("test_resnet", num_classes=7))
    torch.save(net.state_dict(), tmp_path / "cnn.pth")
    encoder = load_encoder("timm:test_resnet", tmp_path / "cnn.pth", resolution=64)
    x = pictures(64)
    fmap = net.forward_features(normalised(x, stats_of("test_resnet"), 4 * 32))  # (1, 96, 4, 4)
    assert encoder(x).shape == (1, 16, 96)
    close(encoder(x)[0, 6], fmap[0, :, 1, 2])  # token = row * grid + column


# ---------------------------------------------------------------- the authors' file formats


def shrink(monkeypatch, name: str, **kwargs) -> EncoderSpec:
    """Cut a row of the table to two blocks, and to what `kwargs` say: a second in place of many."""
    row = ENCODERS[name]
    monkeypatch.setitem(ENCODERS, name, replace(row, kwargs=row.kwargs | {"depth": 2} | kwargs))
    return ENCODERS[name]


def build(spec: EncoderSpec, **kwargs):
    """The network of a row, as its authors have it."""
    return noisy(timm.create_model(spec.timm_name, num_classes=0, **spec.kwargs, **kwargs))


def dinov2_state(net) -> dict:
    """facebookresearch/dinov2 names: a mask token, and positions of the 518 px training."""
    state = {k.replace("reg_token", "register_tokens"): v for k, v in net.state_dict().items()}
    if "register_tokens" in state:  # the class token's position is stored, those of registers not
        at_cls = torch.zeros(1, 1, 384)
        state["pos_embed"] = torch.cat([at_cls, state["pos_embed"]], dim=1)
    return state | {"mask_token": torch.randn(1, 384)}


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_pth(tmp_path, monkeypatch, registers):
    name = "dinov2-reg-s" if registers else "dinov2-s"
    spec = shrink(monkeypatch, name)
    net = build(spec, img_size=518)
    state = dinov2_state(net)
    assert state["pos_embed"].shape[1] == 1370
    torch.save(state, tmp_path / "dinov2.pth")
    encoder, x = load_encoder(name, tmp_path / "dinov2.pth"), pictures(256)

    small, weights = build(spec, img_size=224), net.state_dict()
    prefix = 0 if registers else 1
    weights["pos_embed"] = resample_abs_pos_embed(
        weights["pos_embed"], [16, 16], num_prefix_tokens=prefix
    )
    small.load_state_dict(weights)
    tokens = small.forward_features(normalised(x, IMAGENET, 224))
    close(encoder(x), tokens[:, 5 if registers else 1 :])
    # the final norm is in: undoing its affine part leaves unit variance per token
    plain = (encoder(x) - small.norm.bias) / small.norm.weight
    close(plain.var(2, unbiased=False), torch.ones(1, 256))


def blocks_then(net, x):
    """Last block's output without the final norm, prefix token dropped."""
    h = net.norm_pre(net._pos_embed(net.patch_embed(x)))
    for block in net.blocks:
        h = block(h)
    return h[:, net.num_prefix_tokens :]


def test_mae_pth_is_resampled_to_256_and_not_normalised(tmp_path, monkeypatch):
    net = build(shrink(monkeypatch, "mae-b", embed_dim=64, num_heads=4))
    torch.save({"model": net.state_dict()}, tmp_path / "mae.pth")
    encoder, x = load_encoder("mae-b", tmp_path / "mae.pth"), pictures(256)
    at_224 = net.state_dict()["pos_embed"].clone()
    net.set_input_size(256)
    net.pos_embed.data = resample_abs_pos_embed(at_224, [16, 16])
    x_n = normalised(x, IMAGENET, 256)
    with torch.no_grad():
        close(encoder(x), blocks_then(net, x_n))
        close(net.norm(encoder(x)), net.forward_features(x_n)[:, 1:])
    assert not torch.allclose(encoder(x), net.forward_features(x_n)[:, 1:], atol=0.1)


def test_ijepa_file_with_its_predictor_and_optimizer(tmp_path, monkeypatch):
    net = build(shrink(monkeypatch, "ijepa-h", embed_dim=64, num_heads=4))
    encoder_state = {f"module.{k}": v for k, v in net.state_dict().items()}
    other = {k: torch.randn_like(v) for k, v in encoder_state.items()}
    file = {"encoder": encoder_state, "target_encoder": other, "predictor": other, "epoch": 300}
    torch.save(file, tmp_path / "ijepa.pth.tar")
    encoder, x = load_encoder("ijepa-h", tmp_path / "ijepa.pth.tar"), pictures(256)
    tokens = net.forward_features(normalised(x, IMAGENET, 224))
    assert encoder(x).shape == (1, 256, 64)
    close(encoder(x), tokens)


def dinov3_state(net, qkv_bias: float) -> dict:
    """facebookresearch/dinov3 names."""
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    state = {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}
    for key, value in net.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[key] = value
        if key.endswith("qkv.weight"):
            bias = torch.full((len(value),), qkv_bias)
            state[key.replace("weight", "bias")] = bias
            state[key.replace("weight", "bias_mask")] = torch.ones_like(bias)
    return state


def test_dinov3_pth(tmp_path, monkeypatch, capsys):
    net = build(shrink(monkeypatch, "dinov3-s"), img_size=256)
    torch.save(dinov3_state(net, 0.0), tmp_path / "dinov3.pth")
    encoder, x = load_encoder("dinov3-s", tmp_path / "dinov3.pth"), pictures(256)
    close(encoder(x), net.forward_features(normalised(x, IMAGENET, 256))[:, 5:])
    assert capsys.readouterr().out == ""
    torch.save(dinov3_state(net, 0.5), tmp_path / "biased.pth")
    with pytest.raises(UserError, match=r"qkv\.bias is not zero.*_qkvb variant"):
        load_encoder("dinov3-s", tmp_path / "biased.pth")


def test_mocov3_keeps_the_base_encoder_only(tmp_path, monkeypatch):
    net = build(shrink(monkeypatch, "mocov3-s"))
    base = {f"module.base_encoder.{k}": v for k, v in net.state_dict().items()}
    momentum = {k.replace("base", "momentum"): torch.randn_like(v) for k, v in base.items()}
    head = {"module.base_encoder.head.0.weight": torch.randn(4, 384), "module.predictor.0.bias": 1}
    file = {"epoch": 300, "state_dict": momentum | base | head}
    torch.save(file, tmp_path / "vit-s-300ep.pth.tar")
    encoder, x = load_encoder("mocov3-s", tmp_path / "vit-s-300ep.pth.tar", 224), pictures(224)
    assert encoder.grid == 14
    close(encoder(x), net.forward_features(normalised(x, IMAGENET, 224))[:, 1:])


def test_clip_head_is_dropped_and_tokens_are_not_normalised(tmp_path, monkeypatch):
    net = build(shrink(monkeypatch, "clip-l", embed_dim=64, num_heads=4))
    with_head = net.state_dict() | {
        "head.weight": torch.zeros(768, 64),
        "head.bias": torch.zeros(768),
    }
    save_file(with_head, tmp_path / "clip.safetensors")
    encoder, x = load_encoder("clip-l", tmp_path / "clip.safetensors"), pictures(256)
    with torch.no_grad():
        close(encoder(x), blocks_then(net, normalised(x, OPENAI, 224)))


def perception_state(net) -> dict:
    """facebookresearch/perception_models names, with the projection and a text tower."""
    state, names = (
        {"visual.proj": torch.zeros(96, 1024), "text.w": torch.zeros(1)},
        {
            "attn_pool.latent": "attn_pool.probe",
            "attn_pool.norm": "attn_pool.layernorm",
            "attn_pool.proj": "attn_pool.attn.out_proj",
            "attn_pool.qkv.": "attn_pool.attn.in_proj_",
            "patch_embed.proj": "conv1",
            "pos_embed": "positional_embedding",
            "cls_token": "class_embedding",
            "blocks.": "transformer.resblocks.",
            "norm_pre": "ln_pre",
            ".norm1": ".ln_1",
            ".norm2": ".ln_2",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
            ".attn.proj": ".attn.out_proj",
            ".attn.qkv.": ".attn.in_proj_",
        },
    )
    ours = dict(net.state_dict())
    for part in ("weight", "bias"):
        q_kv = ours.pop(f"attn_pool.q.{part}"), ours.pop(f"attn_pool.kv.{part}")
        ours[f"attn_pool.qkv.{part}"] = torch.cat(q_kv)
    for key, value in ours.items():
        value = {"pos_embed": value[0], "cls_token": value.view(-1)}.get(key, value)
        key = re.sub(r"^norm\.", "ln_post.", key)
        for new, old in names.items():
            key = key.replace(new, old)
        state["visual." + key] = value
    return state


def test_perception_encoder_in_its_authors_names(tmp_path, monkeypatch):
    net = build(shrink(monkeypatch, "pe-core-b", embed_dim=96, num_heads=4))
    assert net.patch_embed.grid_size == (14, 14)
    torch.save(perception_state(net), tmp_path / "pe.pt")
    encoder, x = load_encoder("pe-core-b", tmp_path / "pe.pt", resolution=224), pictures(224)
    tokens = net.forward_features(x)[:, 1:]  # mean and std 0.5: x in [-1, 1] is the input
    assert encoder(x).shape == tokens.shape == (1, 196, 96)
    close(net.norm(encoder(x)), tokens)
    assert not torch.allclose(encoder(x), tokens, atol=0.1)


def test_siglip2_uses_its_own_half_half_normalisation(tmp_path, monkeypatch):
    net = build(shrink(monkeypatch, "siglip2-b", embed_dim=48, num_heads=4))
    save_file(net.state_dict(), tmp_path / "siglip.safetensors")
    encoder, x = load_encoder("siglip2-b", tmp_path / "siglip.safetensors"), pictures(256)
    close(normalised(x, HALF, 256), x)  # [-1, 1] is what it was trained on
    close(encoder(x), net.forward_features(x))


# ---------------------------------------------------------------- the user's mistakes


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700
    return text


def test_unknown_names():
    with pytest.raises(UserError, match=r"unknown encoder dinov2b: nearest is dinov2-b; .* timm:"):
        load_encoder("dinov2b")
    with pytest.raises(UserError, match=r"nearest is timm:resnet18"):
        encoder_shape("timm:resnet181")
    with pytest.raises(UserError) as caught:
        encoder_shape("timm:nope")
    assert "nearest" not in one_line(caught)
    for stride in ("abc", "", "-16", "9" * 5000):
        with pytest.raises(UserError, match=r"stride is .*timm:test_resnet/16"):
            encoder_shape(f"timm:test_resnet/{stride}")


def test_a_file_that_is_absent_or_of_another_network(tmp_path, one_block):
    with pytest.raises(UserError, match=r"encoder\.weights=.*none\.pth: no such file"):
        load_encoder("dinov2-b", tmp_path / "none.pth")
    state = timm.create_model("test_vit3", num_classes=0).state_dict()
    state["extra.bias"] = state.pop("norm.bias")
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=r"does not fit timm:test_vit3.*norm\.bias") as caught:
        load_encoder("timm:test_vit3", tmp_path / "wrong.safetensors")
    assert '"extra.bias"' in one_line(caught)
    with pytest.raises(UserError, match=r"another network than dinov2-s: width 96, b") as caught:
        load_encoder("dinov2-s", tmp_path / "wrong.safetensors")
    one_line(caught)


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD_DIR"],)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PAYLOAD_DIR", str(tmp_path / "executed"))
    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="do not fit mae-b") as caught:
        load_encoder("mae-b", tmp_path / "evil.pth")
    one_line(caught)
    assert not (tmp_path / "executed").exists()


def test_networks_without_a_grid_of_tokens_are_refused():
    with pytest.raises(UserError, match=r"swin_tiny.* cannot make 16 x 16 tokens"):
        load_encoder("timm:swin_tiny_patch4_window7_224", "random")
    with pytest.raises(UserError, match=r"resolution 100 is not a multiple of 16"):
        encoder_shape("dinov2-b", resolution=100)
    assert encoder_shape("dinov2-b", resolution=100, grid=7) == (7, 768)


def test_each_published_file_is_named_as_timm_has_it(tmp_path):
    hub, url = encoder_weight_file("dinov2-b"), encoder_weight_file("ijepa-h")
    assert (hub.repo, hub.name) == ("timm/vit_base_patch14_dinov2.lvd142m", "model.safetensors")
    assert url.url.startswith("https://dl.fbaipublicfiles.com/ijepa/") and not url.repo
    assert "encoder.weights=FILE" in hub.remedy and "encoder.weights=FILE" in url.remedy
    assert encoder_weight_file("dinov2-b", tmp_path / "a").path == tmp_path / "a"
    assert encoder_weight_file("dinov2-b", "random") is None
    with pytest.raises(UserError, match=r"timm publishes no weights of mocov3-b: .*moco-v3"):
        load_encoder("mocov3-b")


def test_offline_a_published_encoder_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model\.safetensors of timm/test_vit3.* not found"):
        load_encoder("timm:test_vit3", resolution=160)


def test_published_weights_come_through_the_hub_cache(monkeypatch, tmp_path):
    net = noisy(timm.create_model("test_vit3", num_classes=1000))  # published with its classifier
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def download(repo, file):
        asked.append((repo, file))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    encoder = load_encoder("timm:test_vit3", resolution=160)
    assert asked == [("timm/test_vit3.r160_in1k", "model.safetensors")]
    x = pictures(160)
    close(encoder(x), net.forward_features(normalised(x, HALF, 160))[:, net.num_prefix_tokens :])


def test_a_cnn_stage_is_chosen_by_its_stride():
    encoder = load_encoder("timm:test_resnet/8", "random", resolution=16, grid=8)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert (encoder.side, encoder.embed_dim) == (64, 48)
    resized = F.interpolate(x, (64, 64), mode="bicubic")  # this network's mean and std are 0.5
    with torch.no_grad():
        h = encoder.net.maxpool(encoder.net.act1(encoder.net.bn1(encoder.net.conv1(resized))))
        expected = encoder.net.layer2(encoder.net.layer1(h)).flatten(2).transpose(1, 2)
    assert torch.allclose(encoder(x), expected, atol=1e-6)
    assert encoder_shape("timm:test_resnet/8", 16, 8) == (8, 48)


def test_a_stride_that_no_stage_has_is_refused():
    with pytest.raises(UserError, match="no stage of stride 3"):
        encoder_shape("timm:test_resnet/3", 16, 8)


@pytest.mark.slow
def test_weights_that_timm_would_bend_to_fit_are_refused(tmp_path):
    """timm resamples a patch convolution of another size, and copies whole numbers and NaN."""
    state = noisy(timm.create_model("test_vit3", num_classes=0)).state_dict()
    first = state["patch_embed.proj.weight"]
    for changed, message in (
        (
            {"patch_embed.proj.weight": first[..., :14, :14].contiguous()},
            "patch 14, where timm:test_vit3 has patch 16",
        ),
        ({"norm.bias": state["norm.bias"].to(torch.int32)}, r"norm\.bias holds torch\.int32"),
        ({"norm.bias": state["norm.bias"] * float("nan")}, r"norm\.bias holds NaN"),
        ({"pos_embed": state["pos_embed"][0]}, "does not fit"),
        ({"norm.bias": state["norm.bias"][:1]}, "does not fit"),
    ):
        save_file(state | changed, tmp_path / "w.safetensors")
        with pytest.raises(UserError, match=message) as caught:
            load_encoder("timm:test_vit3", tmp_path / "w.safetensors", resolution=160)
        one_line(caught)


def test_a_hint_names_the_same_encoder_or_none():
    with pytest.raises(UserError, match="nearest is dinov2-b"):
        load_encoder("DINOv2_B")
    for name in ("dinov4-b", "dinov2-x", "dinov2", "clip", "mae", "random"):
        with pytest.raises(UserError, match="the names are") as caught:
            load_encoder(name)
        assert "nearest" not in one_line(caught)
