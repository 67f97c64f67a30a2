"""The VAEs: table, formats on disk, strictness, and what training needs of `forward`.

The CompVis networks below are written from the published layout of that format (names and
arithmetic), independently of models/autoencoders/layouts.py: that mapping is checked against them.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from safetensors.torch import load_file, save_file
from torch import nn

from models.autoencoders.families import (
    ARCHITECTURES,
    FAMILIES,
    VAES,
    PublishedVAE,
    QwenFamily,
    config_of,
)
from models.autoencoders.names import short_name
from models.checks.errors import UserError
from models.vae import build_vae, load_vae, vae_weight_file

TINY = {  # name: parameters, latent of a 64 px image
    "tiny-f8d4": (67_231, (4, 8, 8)),
    "tiny-f8d16": (72_347, (16, 8, 8)),
    "tiny-f16d32": (78_651, (32, 4, 4)),
    "tiny-qwen": (188_211, (16, 8, 8)),
}


# ---------------------------------------------------------------- CompVis reference networks


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, c_in, 1e-6), nn.Conv2d(c_in, c_out, 3, 1, 1)
        self.norm2, self.conv2 = nn.GroupNorm(32, c_out, 1e-6), nn.Conv2d(c_out, c_out, 3, 1, 1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = nn.GroupNorm(32, c, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))  # (N, C, T)
        weight = torch.softmax(torch.einsum("nct,ncs->nts", q, k) / q.shape[1] ** 0.5, dim=2)
        return x + self.proj_out(torch.einsum("nts,ncs->nct", weight, v).view_as(x))


class Resample(nn.Module):
    def __init__(self, c, stride):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride, padding=0 if stride == 2 else 1)

    def forward(self, x):
        if self.conv.stride == (2, 2):
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def level(c_in, c_out, blocks, attn):
    part = nn.Module()
    part.block = nn.ModuleList(ResBlock(c_in if j == 0 else c_out, c_out) for j in range(blocks))
    part.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attn else 0))
    return part


def run_level(part, h):
    for j, block in enumerate(part.block):
        h = block(h)
        h = part.attn[j](h) if len(part.attn) else h
    return h


class Half(nn.Module):
    """Parts that encoder and decoder share."""

    def frame(self, c_in, c_first, c_mid, c_last, c_out):
        self.conv_in = nn.Conv2d(c_in, c_first, 3, 1, 1)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1 = ResBlock(c_mid, c_mid), AttnBlock(c_mid)
        self.mid.block_2 = ResBlock(c_mid, c_mid)
        self.norm_out = nn.GroupNorm(32, c_last, 1e-6)
        self.conv_out = nn.Conv2d(c_last, c_out, 3, 1, 1)

    def middle(self, h):
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))

    def out(self, h):
        return self.conv_out(F.silu(self.norm_out(h)))


class CompVisEncoder(Half):
    def __init__(self, widths, latent, attn):
        super().__init__()
        self.frame(3, widths[0], widths[-1], widths[-1], 2 * latent)
        ins = (widths[0], *widths)
        self.down = nn.ModuleList(level(ins[i], c, 2, i in attn) for i, c in enumerate(widths))
        for i, c in enumerate(widths[:-1]):
            self.down[i].downsample = Resample(c, 2)

    def forward(self, x):
        h = self.conv_in(x)
        for part in self.down:
            h = run_level(part, h)
            h = part.downsample(h) if hasattr(part, "downsample") else h
        return self.out(self.middle(h))


class CompVisDecoder(Half):
    def __init__(self, widths, latent, attn):
        super().__init__()
        self.frame(latent, widths[-1], widths[-1], widths[0], 3)
        ins = (*widths[1:], widths[-1])
        self.up = nn.ModuleList(level(ins[i], c, 3, i in attn) for i, c in enumerate(widths))
        for i, c in enumerate(widths):
            if i > 0:
                self.up[i].upsample = Resample(c, 1)

    def forward(self, z):
        h = self.middle(self.conv_in(z))
        for part in reversed(self.up):
            h = run_level(part, h)
            h = part.upsample(h) if hasattr(part, "upsample") else h
        return self.out(h)


class CompVisVAE(nn.Module):
    """attn: the levels with attention; decoder_attn: those of the decoder, if they are others."""

    def __init__(self, widths, latent, attn=(), decoder_attn=None, quant=True):
        super().__init__()
        self.encoder = CompVisEncoder(widths, latent, attn)
        self.decoder = CompVisDecoder(
            widths, latent, attn if decoder_attn is None else decoder_attn
        )
        if quant:
            self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
            self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        for parameter in self.parameters():  # every tensor must matter, norms and biases too
            nn.init.normal_(parameter, std=0.1) if parameter.ndim == 1 else None
            parameter.data += parameter.ndim == 1

    def moments(self, x):
        h = self.encoder(x)
        return self.quant_conv(h) if hasattr(self, "quant_conv") else h

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z) if hasattr(self, "quant_conv") else z)


F8D4 = {"widths": (32, 32, 64, 64), "latent": 4}
F16D32 = {"widths": (32, 32, 32, 64, 64), "latent": 32, "attn": (4,)}
# their shapes, narrower
SHAPES = {
    "f8d4": F8D4,
    "f16d32": F16D32,
    "flux": {"widths": (32, 32, 64, 64), "latent": 16, "quant": False},
    "mar-kl16": {**F16D32, "latent": 16, "decoder_attn": ()},
    "ldm-f4": {"widths": (32, 32, 64), "latent": 3},
    "ldm-f32": {"widths": (32, 32, 32, 32, 64, 64), "latent": 64, "attn": (4, 5)},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def compvis_file(path: Path, shape=F8D4, edit=lambda state: state) -> tuple[CompVisVAE, str]:
    net = CompVisVAE(**shape)
    torch.save(edit(net.state_dict()), path)
    return net, str(path)


def perturbed(name: str):
    """A tiny VAE in which norms and biases matter too."""
    vae = build_vae(name)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return vae


# ---------------------------------------------------------------- table and geometry


@pytest.mark.parametrize("name", TINY)
def test_tiny_family(name):
    params, latent = TINY[name]
    vae = build_vae(name)
    assert sum(p.numel() for p in vae.parameters()) == params
    assert vae.latent_shape(64) == latent
    posterior, z, x_hat = vae(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert z.shape == posterior.mean.shape == posterior.std.shape == (2, *latent)
    assert posterior.kl().shape == (2,)
    assert x_hat.shape == (2, 3, 64, 64)
    assert {t.dtype for t in (z, x_hat, posterior.mean, posterior.std)} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "params", "latent"),
    [
        ("sdvae", 83_653_863, (4, 32, 32)),
        ("flux", 83_819_683, (16, 32, 32)),
        ("sd3.5", 83_819_683, (16, 32, 32)),
        ("qwenimage", 126_892_531, (16, 32, 32)),
        ("invae", 69_836_067, (32, 16, 16)),
    ],
)
def test_full_size_on_the_meta_device(name, params, latent):
    with torch.device("meta"):
        vae = build_vae(name)
    assert sum(p.numel() for p in vae.parameters()) == params
    assert vae.latent_shape(256) == latent


@pytest.mark.parametrize(("name", "latent"), [("tiny-f2d4", (4, 8, 8)), ("tiny-f4d8", (8, 4, 4))])
def test_the_vaes_of_digits_have_latents_of_their_names_and_no_attention(name, latent):
    vae = build_vae(name)
    assert vae.latent_shape(16) == latent
    assert not any("attentions" in key for key in vae.state_dict())
    assert vae(torch.zeros(1, 3, 16, 16))[2].shape == (1, 3, 16, 16)


def test_every_row_has_an_architecture_of_a_known_family_that_is_never_tiled():
    for name, row in VAES.items():
        config = ARCHITECTURES[row.architecture]
        assert config["_class_name"] in FAMILIES, name
        assert config.get("sample_size", 256) == 256, name
        assert bool(row.repo) != name.startswith("tiny-"), name
    assert {row.architecture for row in VAES.values()} == set(ARCHITECTURES)


def test_the_published_scalars_are_in_the_config():
    scalars = {"sdvae": (0.18215, None), "e2e-flux": (0.3611, 0.1159), "sd3.5": (1.5305, 0.0609)}
    for name, expected in scalars.items():
        config = config_of(name)
        assert (config["scaling_factor"], config["shift_factor"]) == expected
    assert "scaling_factor" not in config_of("invae")


def test_a_third_family_is_one_adapter_and_one_row(monkeypatch, tmp_path):
    class WanFamily(QwenFamily):
        diffusers_class = "AutoencoderKLWan"

    config = ARCHITECTURES["tiny-qwen"] | {"_class_name": "AutoencoderKLWan"}
    monkeypatch.setitem(FAMILIES, "AutoencoderKLWan", WanFamily())
    monkeypatch.setitem(ARCHITECTURES, "tiny-wan", config)
    monkeypatch.setitem(VAES, "tiny-wan", PublishedVAE("tiny-wan"))
    vae, x = load_vae("tiny-wan"), torch.rand(2, 3, 32, 32)
    vae.save(tmp_path, torch.zeros(16), torch.ones(16))
    again, noise = load_vae(tmp_path), torch.randn(2, *vae.latent_shape(32))
    assert type(again.net).__name__ == "AutoencoderKLWan"
    assert torch.equal(again(x, noise)[2], vae(x, noise)[2])


def test_a_resolution_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"resolution 100 is not a multiple .* 8; take 96"):
        build_vae("tiny-f8d4").latent_shape(100)


def test_forward_uses_the_given_noise():
    vae, x = perturbed("tiny-f8d4"), torch.rand(2, 3, 32, 32) * 2 - 1
    noise = torch.randn(2, 4, 4, 4)
    posterior, z, x_hat = vae(x, noise)
    assert torch.equal(z, posterior.mean + posterior.std * noise)
    assert torch.equal(x_hat, vae.decode(z))
    torch.manual_seed(3)
    drawn = vae(x)[1]
    torch.manual_seed(3)
    assert torch.equal(drawn, posterior.sample())


# ---------------------------------------------------------------- CompVis files


@pytest.mark.parametrize("shape", SHAPES)
def test_compvis_file_is_the_same_function(tmp_path, shape):
    net, path = compvis_file(tmp_path / "vae.pt", SHAPES[shape])
    vae, x = load_vae(path), torch.rand(1, 3, 64, 64, dtype=torch.float64) * 2 - 1
    assert sum(p.numel() for p in vae.parameters()) == sum(p.numel() for p in net.parameters())
    net, vae = net.double(), vae.double()  # float32 rounds twelve layers of this to 7e-5
    with torch.no_grad():
        moments = net.moments(x)
        posterior, z = vae.encode(x), moments.chunk(2, dim=1)[0]
        torch.testing.assert_close(posterior.parameters, moments, atol=1e-12, rtol=1e-12)
        image = net.decode(z)
        torch.testing.assert_close(vae.decode(z), image, atol=1e-12, rtol=1e-12)
    assert image.std() > 0.01 and moments.std() > 0.01


def test_compvis_weights_into_a_named_architecture(tmp_path):
    state = {"state_dict": perturbed("tiny-f16d32").net.state_dict()}
    # the tiny network under CompVis names, which only this test needs
    names = {
        "down_blocks.4.attentions.": "down.4.attn.",
        "down_blocks.": "down.",
        "resnets.": "block.",
        "downsamplers.0.": "downsample.",
        "upsamplers.0.": "upsample.",
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
        "mid_block.block.0": "mid.block_1",
        "mid_block.block.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1",
        "up_blocks.0.attentions.": "up.4.attn.",
        **{f"up_blocks.{i}.": f"up.{4 - i}." for i in range(5)},
        "group_norm": "norm",
        "to_out.0": "proj_out",
        "to_": "",
    }
    compvis = {}
    for key, value in state["state_dict"].items():
        matrix = ".to_" in key and key.endswith("weight")
        for new, old in names.items():
            key = key.replace(new, old)
        compvis[key] = value[:, :, None, None] if matrix else value
    assert any(key.startswith("decoder.up.4.attn.0.q.") for key in compvis)
    for path, save in (
        (tmp_path / "vae.ckpt", torch.save),
        (tmp_path / "v.safetensors", save_file),
    ):
        save({k: v.contiguous() for k, v in compvis.items()}, path)
        loaded = load_vae("tiny-f16d32", weights=path).net.state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in state["state_dict"].items())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s | {"decoder.extra": s["quant_conv.bias"]}, r"1 unexpected \(decoder\.extra\)"),
        (
            lambda s: {k: v for k, v in s.items() if k != "encoder.down.1.block.0.conv1.bias"},
            r"1 missing \(encoder\.down_blocks\.1\.resnets\.0\.conv1\.bias\)",
        ),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("decoder.mid.")},
            r"26 missing \(decoder\.mid_block\.[^,]+, [^,]+, [^,]+, \.\.\.\)",
        ),
        (lambda s: s | {"quant_conv.bias": torch.zeros(3)}, r"quant_conv\.bias \(3,\) for \(8,\)"),
        (lambda s: {k: v for k, v in s.items() if "decoder" not in k}, "decoder.conv_in.weight"),
        (lambda s: {"weight": s["quant_conv.bias"]}, "no tensors encoder.conv_in.weight"),
    ],
)
def test_compvis_load_is_strict(tmp_path, edit, message):
    _, path = compvis_file(tmp_path / "vae.pt", F8D4, edit)
    with pytest.raises(UserError, match=message) as caught:
        load_vae(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_another_architecture_are_refused(tmp_path):
    _, path = compvis_file(tmp_path / "vae.pt", F8D4)
    with pytest.raises(UserError, match=r"do not fit tiny-f16d32: tensors .* missing .*; .* shape"):
        load_vae("tiny-f16d32", weights=path)


# ---------------------------------------------------------------- diffusers folders


@pytest.mark.parametrize("name", TINY)
def test_folder_round_trip_is_bit_equal(tmp_path, name):
    vae = perturbed(name)
    mean, std = torch.randn(vae.latent_channels), torch.rand(vae.latent_channels) + 0.5
    vae.save(tmp_path / "step" / "vae", mean, std)
    assert vae.latent_stats() is None  # saving leaves the network as it was
    vae.save(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["latents_mean"] is None

    cls = AutoencoderKLQwenImage if name == "tiny-qwen" else AutoencoderKL
    plain = cls.from_pretrained(tmp_path / "step" / "vae")
    for other in (load_vae(tmp_path / "step").net, load_vae(tmp_path / "step" / "vae").net, plain):
        assert all(torch.equal(other.state_dict()[k], v) for k, v in vae.net.state_dict().items())
    again = load_vae(str(tmp_path / "step"))
    assert all(torch.equal(a, b) for a, b in zip(again.latent_stats(), (mean, std)))
    assert isinstance(plain.config.latents_mean[0], float)
    if name != "tiny-qwen":
        assert plain.config.scaling_factor == 1.0 and plain.config.shift_factor == 0.0
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(again.encode(x).mean, vae.encode(x).mean)


def test_folder_as_weights_of_a_short_name_brings_its_statistics(tmp_path):
    vae = perturbed("tiny-f8d4")
    vae.save(tmp_path, torch.arange(4.0), torch.ones(4))
    loaded = load_vae("tiny-f8d4", weights=str(tmp_path))
    assert loaded.latent_stats()[0].tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="do not fit tiny-f8d16"):
        load_vae("tiny-f8d16", weights=tmp_path)


def test_random_start_of_anything_has_no_statistics(tmp_path):
    assert build_vae("tiny-qwen").latent_stats() is None
    perturbed("tiny-qwen").save(tmp_path, torch.zeros(16), torch.ones(16))
    assert load_vae(tmp_path).latent_stats() is not None
    random = load_vae(tmp_path, weights=None)
    assert random.latent_stats() is None
    assert sum(p.numel() for p in random.parameters()) == TINY["tiny-qwen"][0]


def test_channels_last_weights_are_saved_whole(tmp_path):
    vae = perturbed("tiny-f8d4").to(memory_format=torch.channels_last)
    vae.save(tmp_path)
    loaded = load_vae(tmp_path).net.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in vae.net.state_dict().items())


def test_old_attention_names_and_half_precision_load_in_float32(tmp_path):
    vae = perturbed("tiny-f8d4").half().float()  # values that float16 holds exactly
    vae.save(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file, state = tmp_path / "diffusion_pytorch_model.safetensors", {}
    for key, value in load_file(file).items():
        for new, name in old.items():
            key = key.replace(new, name)
        state[key] = value.half()
    assert any("proj_attn" in key for key in state)
    save_file(state, file)
    loaded = load_vae(tmp_path).net.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in vae.net.state_dict().items())
    assert {v.dtype for v in loaded.values()} == {torch.float32}


def test_folder_load_is_strict(tmp_path):
    build_vae("tiny-f8d4").save(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["encoder.new"] = state.pop("encoder.conv_in.bias")
    save_file(state, file)
    with pytest.raises(
        UserError, match=r"1 missing \(encoder\.conv_in\.bias\); 1 unexpected \(enc"
    ):
        load_vae(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file; .* save_pretrained"):
        load_vae(tmp_path)


def test_class_is_read_from_the_config_not_from_the_path(tmp_path):
    folder = tmp_path / "qwenimage-vae"
    build_vae("tiny-f8d4").save(folder)
    assert isinstance(load_vae(folder).net, AutoencoderKL)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "SiT"}))
    with pytest.raises(UserError, match=r"is a SiT, not a VAE: expected AutoencoderKL or"):
        load_vae(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json in it, nor in"):
        load_vae(tmp_path / "empty")


# ---------------------------------------------------------------- names and the hub


def test_unknown_names_and_missing_files_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="did you mean sdvae"):
        load_vae("sdvea")
    with pytest.raises(UserError, match=r"no VAE .*absent/vae\.pt: not a short name, file, folder"):
        load_vae(tmp_path / "absent" / "vae.pt")
    with pytest.raises(UserError, match=r"vae\.weights=nowhere\.pt: no such file; .* of sdvae"):
        load_vae("sdvae", weights="nowhere.pt")


def test_each_spec_names_its_file(tmp_path):
    """How a file is found and fetched is tested in weights/test_published.py."""
    sd, qwen, other = (vae_weight_file(spec) for spec in ("sdvae", "qwenimage", "a/b"))
    assert (sd.repo, sd.subfolders) == ("stabilityai/sd-vae-ft-mse", ("",))
    assert (qwen.repo, qwen.subfolders) == ("Qwen/Qwen-Image", ("vae",))
    assert (other.repo, other.subfolders) == ("a/b", ("", "vae"))
    for file in (sd, qwen, other):
        assert file.name == "diffusion_pytorch_model.safetensors"
        assert file.companions == ("config.json",)
        assert file.remedy.endswith("then give DIR in place of its name")
    tagged = vae_weight_file("a/b@v1")
    assert (tagged.repo, tagged.revision, other.revision) == ("a/b", "v1", None)
    assert "hf download a/b --revision v1 " in tagged.remedy
    build_vae("tiny-f8d4").save(tmp_path / "vae")
    weights = tmp_path / "vae" / sd.name
    for spec, place in ((tmp_path, "hub"), ("sdvae", tmp_path), ("sdvae", weights)):
        assert vae_weight_file(spec, place).find() == weights
    assert vae_weight_file("sdvae", None) is vae_weight_file("tiny-f8d4") is None


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_cached_repository_loads_offline_from_root_or_subfolder(monkeypatch, tmp_path, subfolder):
    vae = perturbed("tiny-f8d4")
    commit = tmp_path / "models--someone--some-vae" / "snapshots" / ("0" * 40)
    vae.save(commit / subfolder)
    refs = tmp_path / "models--someone--some-vae" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    loaded = load_vae("someone/some-vae").net.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in vae.net.state_dict().items())


# ---------------------------------------------------------------- training features


def test_qwen_equals_diffusers_and_is_unclamped():
    vae, x = perturbed("tiny-qwen"), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        theirs = vae.net.encode(x.unsqueeze(2)).latent_dist
        posterior, z = vae.encode(x), 30 * torch.randn(2, 16, 4, 4)
        assert torch.equal(posterior.parameters, theirs.parameters.squeeze(2))
        assert torch.equal(posterior.mean, theirs.mean.squeeze(2))
        ours, clamped = vae.decode(z), vae.net.decode(z.unsqueeze(2)).sample.squeeze(2)
    assert ours.abs().max() > 1
    assert torch.equal(ours.clamp(-1, 1), clamped)
    by_hand = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum((1, 2, 3))
    torch.testing.assert_close(posterior.kl(), by_hand)


@pytest.mark.parametrize("name", [*TINY, "tiny-f2d4"])
def test_every_trainable_parameter_gets_a_gradient(name):
    vae = build_vae(name)
    posterior, _, x_hat = vae(torch.rand(2, 3, 32, 32))
    (x_hat.square().mean() + posterior.kl().mean()).backward()
    frozen = [key for key, p in vae.named_parameters() if not p.requires_grad]
    assert len(frozen) == (8 if name == "tiny-qwen" else 0)
    assert all("time_conv" in key for key in frozen)
    assert all(p.grad is not None for p in vae.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["tiny-f16d32", "tiny-qwen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_float32_under_autocast(name, dtype):
    vae = build_vae(name)
    with torch.autocast("cpu", dtype):
        posterior, z, x_hat = vae(torch.rand(1, 3, 32, 32))
        kl = posterior.kl()
    tensors = (posterior.parameters, posterior.mean, posterior.std, posterior.var, z, x_hat, kl)
    assert {t.dtype for t in tensors} == {torch.float32}


@pytest.mark.parametrize("name", ["tiny-f16d32", "tiny-qwen"])
def test_gradient_checkpointing_changes_no_gradient(name):
    vae, x = perturbed(name), torch.rand(2, 3, 32, 32)
    noise = torch.randn(2, *vae.latent_shape(32))
    grads = []
    for _ in range(2):
        vae.zero_grad()
        posterior, _, x_hat = vae(x, noise)
        (x_hat.square().mean() + 1e-3 * posterior.kl().mean()).backward()
        grads.append({k: p.grad.clone() for k, p in vae.named_parameters() if p.requires_grad})
        vae.enable_gradient_checkpointing()
    assert all(torch.equal(grads[0][key], grads[1][key]) for key in grads[0])


def test_qwen_checkpointing_recomputes(monkeypatch):
    vae, calls = build_vae("tiny-qwen"), []
    vae.net.encoder.conv_in.register_forward_hook(lambda *_: calls.append(1))
    vae.enable_gradient_checkpointing()
    vae(torch.rand(1, 3, 32, 32))[2].sum().backward()
    assert len(calls) == 2


# ---------------------------------------------------------------- configs of other people

WRONG_VALUES = (None, True, -1, 1.5, 10**9, 10**30, "x", [], ["x"], {}, [[1]], [10**9] * 4)
ARCHITECTURE = {  # entries that say what the network is
    "tiny-f8d4": ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block",
                  "latent_channels", "in_channels", "out_channels", "norm_num_groups", "act_fn",
                  "_class_name"),
    "tiny-qwen": ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample",
                  "input_channels"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "key"), [(n, k) for n, keys in ARCHITECTURE.items() for k in keys]
)
def test_a_wrong_entry_in_a_config_is_one_line(tmp_path, name, key):
    """Wrong types, ranges and numbers of levels, before memory is taken for them."""
    build_vae(name).save(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    if key not in config:
        pytest.skip("this diffusers has no such setting")
    for value in (*WRONG_VALUES, [0] * 4, 0):
        if value == config[key]:
            continue
        file.write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError) as caught:
            load_vae(tmp_path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "stats",
    [([0] * 3, [1] * 4), ([0] * 4, [1] * 5), ([0] * 4, [1, 1, 1, 0]), ([0] * 4, [1, 1, 1, -1]),
     ([0] * 4, None), (["0"] * 4, [1] * 4), (0, 1)],
)  # fmt: skip
def test_statistics_that_do_not_fit_the_latents_are_refused(tmp_path, stats):
    build_vae("tiny-f8d4").save(tmp_path)
    file = tmp_path / "config.json"
    mean, std = stats
    known = json.loads(file.read_text()) | {"latents_mean": mean, "latents_std": std}
    file.write_text(json.dumps(known))
    with pytest.raises(UserError, match="latents_"):
        load_vae(tmp_path)


def test_integer_weights_of_a_vae_are_refused(tmp_path):
    build_vae("tiny-f8d4").save(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({k: v.to(torch.int64) for k, v in load_file(file).items()}, file)
    with pytest.raises(UserError, match="of another type"):
        load_vae(tmp_path)


def test_a_published_vae_is_known_by_every_name_of_its(monkeypatch, tmp_path):
    for asked, meant in {
        "stabilityai/sd-vae-ft-mse": "sdvae",
        "sd-vae-ft-mse": "sdvae",
        "sd-vae-ft-ema": "sdvae-ema",
        "stabilityai/sd-vae-ft-mse-original": "sdvae",
        "https://huggingface.co/stabilityai/sd-vae-ft-mse": "sdvae",
        "https://huggingface.co/someone/vae/tree/main/": "someone/vae",
        "stabilityai/sdxl-vae": "sdxl",
        "REPA-E/e2e-vavae-hf": "e2e-vavae",
        "REPA-E/e2e-sdvae": "e2e-sdvae",
        "vavae-hf": "vavae",
        "flux.1-dev": "flux",
        "Qwen/Qwen-Image": "qwenimage",
    }.items():
        assert short_name(asked) == meant
        assert vae_weight_file(asked) == vae_weight_file(meant)
        assert vae_weight_file(asked, None) is None
    with torch.device("meta"):  # needs no network, as a short name does
        assert build_vae("stabilityai/sd-vae-ft-mse").net.config.scaling_factor == 0.18215
    monkeypatch.chdir(tmp_path)  # a folder of that name is that folder
    build_vae("tiny-f8d4").save("stabilityai/sd-vae-ft-mse")
    assert load_vae("stabilityai/sd-vae-ft-mse").latent_shape(8) == (4, 1, 1)
    with pytest.raises(UserError, match="no VAE stabilityai/sd-vae: not a short name"):
        load_vae("stabilityai/sd-vae")  # of an owner who is a folder here: no question to the hub


def test_a_hint_names_the_same_vae_or_none():
    for asked, meant in {
        "SD_VAE_FT_MSE": "sdvae",
        "FLUX1-dev": "flux",
        "SDVAE.": "sdvae",
        "sd35": "sd3.5",
    }.items():
        with pytest.raises(UserError, match=rf"did you mean {meant}\?"):
            load_vae(asked)
    for asked in ("f8d4", "f16d32", "flux2", "sd3", "e2e", "kl-f8", "sdvae2", "tiny"):
        with pytest.raises(UserError, match="the short names are") as caught:
            load_vae(asked)
        assert "did you mean" not in str(caught.value)
    with pytest.raises(UserError, match="empty"):
        load_vae("")
