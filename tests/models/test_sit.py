"""SiT against an independent implementation written out here, in the published key layout."""

import inspect
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from models.checks.errors import UserError
from models.sit import SiT, load_sit, sincos_pos_embed
from models.sizes import SIZES

TINY = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 64,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
    "encoder_dims": (24,),
    "align_depth": 2,
    "projector_dim": 48,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(**changes):
    return SiT(**TINY | changes)


def random_state(net):
    """Every tensor random, buffers too, of a size that keeps activations near 1."""
    state = {}
    for key, value in net.state_dict().items():
        if key == "bn.num_batches_tracked":
            state[key] = torch.tensor(1234567)
        elif key == "bn.running_var":
            state[key] = torch.rand(value.shape) + 0.5
        elif value.ndim > 1 and "embed" not in key.replace("x_embedder", "").replace(
            "t_embedder", ""
        ):
            state[key] = torch.randn(value.shape) / math.sqrt(value[0].numel())
        else:
            state[key] = torch.randn(value.shape)
    return state


def randomised(**changes):
    net = tiny(**changes)
    net.load_state_dict(random_state(net), strict=True)
    return net


def inputs(num=3, side=8, classes=10):
    y = torch.arange(num) % (classes + 1)
    return torch.randn(num, 4, side, side), torch.rand(num), y


# --------------------------------------------------------------------------------------
# The independent implementation: functions on a state dict, float64.


def silu(h):
    return h / (1 + (-h).exp())


def gelu(h):
    return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def norm(h, eps):
    mean = h.mean(-1, keepdim=True)
    return (h - mean) / ((h - mean) ** 2).mean(-1, keepdim=True).add(eps).sqrt()


def reference(state, x, t, y, *, patch, heads, depth, align_depth, encoders, projector, qk_norm):
    """(v, feats, h after every block) of a SiT whose tensors are `state`."""
    s = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    x, t = x.double(), t.double()
    n, channels, side, _ = x.shape
    g = side // patch

    def linear(name, h):
        return h @ s[name + ".weight"].T + s[name + ".bias"]

    def qk(name, h):
        return norm(h, 1e-5) * s[name + ".weight"] + s[name + ".bias"] if qk_norm else h

    def attention(name, h):
        tokens, width = h.shape[1:]
        qkv = linear(name + ".qkv", h).reshape(n, tokens, 3, heads, width // heads)
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        q, k = qk(name + ".q_norm", q), qk(name + ".k_norm", k)
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(width // heads), dim=-1)
        return linear(name + ".proj", (weights @ v).transpose(1, 2).reshape(n, tokens, width))

    def project(k, h):
        name = f"projectors.{k}"
        if projector == "mlp":
            h = silu(linear(name + ".0", h))
            return linear(name + ".4", silu(linear(name + ".2", h)))
        grid = h.reshape(n, g, g, -1).permute(0, 3, 1, 2)
        out = F.conv2d(grid, s[name + ".weight"], s[name + ".bias"], padding=1)
        return out.permute(0, 2, 3, 1).reshape(n, g * g, -1)

    pixels = x.reshape(n, channels, g, patch, g, patch).permute(0, 2, 4, 1, 3, 5)
    weight = s["x_embedder.proj.weight"]
    h = pixels.reshape(n, g * g, -1) @ weight.reshape(len(weight), -1).T
    h = h + s["x_embedder.proj.bias"] + s["pos_embed"]

    frequencies = torch.tensor([10000.0 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angles = t[:, None] * frequencies
    c = torch.cat([angles.cos(), angles.sin()], dim=-1)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", c)))
    c = c + s["y_embedder.embedding_table.weight"][y]

    feats, hidden = [], []
    for i in range(depth):
        name = f"blocks.{i}"
        six = linear(name + ".adaLN_modulation.1", silu(c)).reshape(n, 6, 1, -1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = six.unbind(1)
        h = h + gate_msa * attention(name + ".attn", norm(h, 1e-6) * (1 + scale_msa) + shift_msa)
        m = norm(h, 1e-6) * (1 + scale_mlp) + shift_mlp
        h = h + gate_mlp * linear(name + ".mlp.fc2", gelu(linear(name + ".mlp.fc1", m)))
        hidden.append(h)
        if i + 1 == align_depth:
            feats = [project(k, h) for k in range(encoders)]

    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c)).reshape(n, 2, 1, -1).unbind(1)
    out = linear("final_layer.linear", norm(h, 1e-6) * (1 + scale) + shift)
    out = out.reshape(n, g, g, patch, patch, channels)
    v = torch.einsum("nhwpqc->nchpwq", out).reshape(n, channels, side, side)
    return v, feats, hidden


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("projector", ["mlp", "conv"])
@pytest.mark.parametrize("encoder_dims", [(24,), (24, 40)])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_random_published_state_dict_gives_the_same_velocity_and_features(
    qk_norm, projector, encoder_dims, patch
):
    """Every tensor random, strict load, other seed for the network: equal to 1e-5."""
    net = tiny(qk_norm=qk_norm, projector=projector, encoder_dims=encoder_dims, patch_size=patch)
    state = random_state(net)
    net.load_state_dict(state, strict=True)
    x, t, y = inputs(num=11)
    v, feats = net(x, t, y)
    v_ref, feats_ref, _ = reference(
        state,
        x,
        t,
        y,
        patch=patch,
        heads=4,
        depth=4,
        align_depth=2,
        encoders=len(encoder_dims),
        projector=projector,
        qk_norm=qk_norm,
    )
    assert v_ref.std() > 0.1  # the comparison is of something
    assert (v - v_ref).abs().max() < 1e-5 * max(1, v_ref.abs().max())
    assert [f.shape for f in feats] == [(11, (8 // patch) ** 2, dim) for dim in encoder_dims]
    for f, f_ref in zip(feats, feats_ref):
        assert f_ref.std() > 0.05
        assert (f - f_ref).abs().max() < 1e-5 * max(1, f_ref.abs().max())


@pytest.mark.parametrize("small", ["tokens", "queries and keys"])
def test_norm_eps_shows_at_a_thousandth(small):
    """LayerNorm's 1e-6 and QK-norm's 1e-5 are invisible at unit variance, not here."""
    net = tiny(qk_norm=True)
    state = random_state(net)
    for key, value in state.items():
        if small == "tokens" and (key.startswith("x_embedder") or key == "pos_embed"):
            value *= 1e-3
        elif small == "tokens" and "blocks" in key and "adaLN" in key:
            value.view(6, -1)[[2, 5]] *= 1e-3  # the gates: tokens stay small
        elif small != "tokens" and ".qkv." in key:
            value.view(3, -1)[:2] *= 1e-3
    net.load_state_dict(state, strict=True)
    x, t, y = inputs()
    kwargs = {"heads": 4, "depth": 4, "align_depth": 4, "encoders": 1, "projector": "mlp"}
    v, _, hidden = reference(state, x, t, y, patch=2, qk_norm=True, **kwargs)
    assert (hidden[-1].std() < 1e-2) == (small == "tokens")
    assert (net(x, t, y)[0] - v).abs().max() < 1e-4 * v.abs().max()


def test_loaded_latent_norm_statistics_are_those_used():
    net = randomised().eval()
    z = torch.randn(5, 4, 8, 8)
    mean, var = (b.double().view(1, 4, 1, 1) for b in (net.bn.running_mean, net.bn.running_var))
    expected = (z.double() - mean) / (var + 1e-4).sqrt()
    assert (net.normalize(z) - expected).abs().max() < 1e-5
    assert (net.denormalize(net.normalize(z)) - z).abs().max() < 1e-5


def test_position_embedding_is_that_of_mae_and_dit():
    """Literal numpy version: meshgrid with w first, so the first half of D encodes the column."""

    def one_axis(dim, positions):
        omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
        out = np.einsum("m,d->md", positions.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    dim, side = 48, 5
    axis = np.arange(side, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis), axis=0)
    expected = np.concatenate([one_axis(dim // 2, grid[0]), one_axis(dim // 2, grid[1])], axis=1)
    found = sincos_pos_embed(dim, side)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=1e-7)


# --------------------------------------------------------------------------------------
# Keys, sizes, counts


def expected_keys(depth, encoders, qk_norm, projector="mlp"):
    both = ("weight", "bias")
    keys = {f"x_embedder.proj.{p}" for p in both}
    keys |= {f"t_embedder.mlp.{i}.{p}" for i in (0, 2) for p in both}
    keys |= {"y_embedder.embedding_table.weight", "pos_embed"}
    parts = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    parts += ["attn.q_norm", "attn.k_norm"] if qk_norm else []
    keys |= {f"blocks.{i}.{part}.{p}" for i in range(depth) for part in parts for p in both}
    inner = (".0", ".2", ".4") if projector == "mlp" else ("",)
    keys |= {f"projectors.{k}{i}.{p}" for k in range(encoders) for i in inner for p in both}
    keys |= {f"final_layer.{part}.{p}" for part in ("linear", "adaLN_modulation.1") for p in both}
    return keys | {f"bn.{b}" for b in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("encoders", [0, 1, 2])
def test_state_dict_has_exactly_the_published_keys(qk_norm, encoders):
    net = tiny(qk_norm=qk_norm, encoder_dims=(16, 24)[:encoders])
    assert set(net.state_dict()) == expected_keys(4, encoders, qk_norm)


def test_conv_projector_has_one_weight_and_one_bias_per_encoder():
    net = tiny(projector="conv", encoder_dims=(16, 24))
    assert set(net.state_dict()) == expected_keys(4, 2, False, "conv")


def test_published_shapes_of_xl2():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in SiT(**SIZES["SiT-XL/2"]).state_dict().items()}
    assert shapes["x_embedder.proj.weight"] == (1152, 4, 2, 2)
    assert shapes["t_embedder.mlp.0.weight"] == (1152, 256)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert shapes["pos_embed"] == (1, 256, 1152)
    assert shapes["blocks.27.attn.qkv.weight"] == (3456, 1152)
    assert shapes["blocks.27.adaLN_modulation.1.weight"] == (6912, 1152)
    assert shapes["projectors.0.4.weight"] == (768, 2048)
    assert shapes["final_layer.linear.weight"] == (16, 1152)
    assert shapes["bn.running_var"] == (4,)


SHAPES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def test_the_sixteen_sizes_are_the_published_ones():
    assert {
        f"SiT-{s}/{p}": {"hidden_size": d, "depth": n, "num_heads": h, "patch_size": p}
        for s, (n, d, h) in SHAPES.items()
        for p in (1, 2, 4, 8)
    } == SIZES


@pytest.mark.parametrize(("size", "patch"), [("S", 8), ("B", 4), ("L", 2), ("XL", 1)])
def test_every_width_and_patch_builds_and_runs(size, patch):
    """On the meta device: shapes of a whole forward."""
    with torch.device("meta"):
        net = SiT(input_size=16, **SIZES[f"SiT-{size}/{patch}"])
        v, (feats,) = net(
            torch.randn(2, 4, 16, 16), torch.rand(2), torch.zeros(2, dtype=torch.long)
        )
    assert len(net.blocks) == SHAPES[size][0]
    assert v.shape == (2, 4, 16, 16)
    assert feats.shape == (2, (16 // patch) ** 2, 768)


@pytest.mark.parametrize(("size", "millions"), [("B/2", 130), ("L/2", 458), ("XL/2", 675)])
def test_parameter_counts_without_projector_are_the_published_ones(size, millions):
    with torch.device("meta"):
        net = SiT(**SIZES[f"SiT-{size}"], encoder_dims=())
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions


# --------------------------------------------------------------------------------------
# Initialisation


def test_output_is_zero_and_blocks_are_the_identity_at_init():
    net = tiny()
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(torch.equal(args[0], out)))
    v, feats = net(*inputs())
    assert v.abs().max() == 0
    assert seen == [True] * 4
    assert feats[0].abs().max() > 0


def test_initial_weights_are_those_of_dit():
    """Xavier-uniform linears (the patch embedding is one), N(0, 0.02) embeddings, no biases."""
    net = tiny(hidden_size=256, num_classes=999, qk_norm=False)
    modulated = ("adaLN_modulation", "final_layer.linear")
    for name, p in net.named_parameters():
        if name.endswith("bias") or any(m in name for m in modulated):
            assert not p.any(), name
        elif name.startswith(("y_embedder", "t_embedder")):
            assert p.std().item() == pytest.approx(0.02, rel=0.02), name
        else:
            bound = math.sqrt(6 / (p.shape[0] + p[0].numel()))
            assert p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


# --------------------------------------------------------------------------------------
# Labels


@pytest.mark.parametrize("classes", [1, 10, 1000])
def test_any_number_of_classes_has_its_null_row_behind_the_last(classes):
    net = randomised(num_classes=classes)
    assert net.null_label == classes
    assert net.y_embedder.embedding_table.num_embeddings == classes + 1
    x, t, _ = inputs(num=1)
    labels = sorted({0, classes - 1, net.null_label})
    outputs = [net(x, t, torch.tensor([y]))[0] for y in labels]
    for i, a in enumerate(outputs):
        assert all(not torch.allclose(a, b) for b in outputs[:i])
    with pytest.raises(IndexError):
        net(x, t, torch.tensor([classes + 1]))


def test_without_label_dropout_there_is_no_null_row():
    net = tiny(class_dropout_prob=0)
    assert net.null_label is None
    assert net.y_embedder.embedding_table.num_embeddings == 10
    with pytest.raises(IndexError):
        net(*inputs()[:2], torch.tensor([10, 0, 0]))


def test_nothing_is_random_in_train_mode():
    """Label dropout happens outside: two passes in train mode are bit-equal to one in eval mode."""
    net, batch = randomised(class_dropout_prob=0.9), inputs()
    first, second = net.train()(*batch)[0], net(*batch)[0]
    assert torch.equal(first, second)
    assert torch.equal(first, net.eval()(*batch)[0])


# --------------------------------------------------------------------------------------
# The early exit of the VAE phase


@pytest.mark.parametrize("align_depth", [1, 2, 4])
def test_stop_at_align_gives_the_features_of_the_full_pass_and_runs_no_later_block(align_depth):
    net, batch = randomised(align_depth=align_depth, encoder_dims=(24, 40)), inputs()
    _, full = net(*batch)
    ran = []
    modules = [*net.blocks, net.final_layer]
    for number, module in enumerate(modules, start=1):
        module.register_forward_hook(lambda *_, number=number: ran.append(number))
    v, early = net(*batch, stop_at_align=True)
    assert v is None
    assert ran == list(range(1, align_depth + 1))
    assert len(early) == 2 and all(torch.equal(a, b) for a, b in zip(full, early))


@pytest.mark.parametrize("align_depth", [1, 3])
def test_features_are_taken_after_block_align_depth_counted_from_one(align_depth):
    net, (x, t, y) = randomised(align_depth=align_depth), inputs()
    kwargs = {
        "patch": 2,
        "heads": 4,
        "depth": 4,
        "encoders": 1,
        "projector": "mlp",
        "qk_norm": False,
    }
    _, _, hidden = reference(net.state_dict(), x, t, y, align_depth=1, **kwargs)
    expected = net.projectors[0](hidden[align_depth - 1].float())
    assert (net(x, t, y)[1][0] - expected).abs().max() < 1e-4


def test_no_encoder_means_no_projector_and_no_features():
    net = randomised(encoder_dims=())
    v, feats = net(*inputs())
    assert feats == [] and v.shape == (3, 4, 8, 8)


# --------------------------------------------------------------------------------------
# Saving, gradients


@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": True, "projector": "conv", "encoder_dims": (8, 24)}]
)
@pytest.mark.parametrize("load", [SiT.from_pretrained, load_sit], ids=["diffusers", "ours"])
def test_save_and_load_is_bit_equal_buffers_and_config_included(tmp_path, changes, load):
    net, batch = randomised(**changes, latent_norm="fixed"), inputs()
    net.save_pretrained(tmp_path)
    again = load(tmp_path)
    before, after = net.state_dict(), again.state_dict()
    assert list(before) == list(after)
    for key in before:
        assert before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]), key
    assert torch.equal(net(*batch)[0], again(*batch)[0])
    assert again.bn.fixed and again.null_label == 10 and not again.training
    mine = {k: list(v) if isinstance(v, tuple) else v for k, v in net.config.items() if k[0] != "_"}
    theirs = {k: list(v) if isinstance(v, tuple) else v for k, v in again.config.items()}
    assert mine == {k: theirs[k] for k in mine}


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved SiT, and its file of weights."""
    tiny().save_pretrained(tmp_path)
    return tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"


def test_a_loaded_sit_trains_and_is_saved_like_any_other(saved):
    """Its tensors are those of the file, not copies of random ones: nothing is left on meta."""
    net = load_sit(saved[0])
    assert {t.device.type for t in (*net.parameters(), *net.buffers())} == {"cpu"}
    net.train()(*inputs())[0].sum().backward()
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    net.normalize(torch.randn(3, 4, 8, 8))
    net.save_pretrained(saved[0])
    again = load_sit(saved[0]).state_dict()
    assert all(torch.equal(again[k], v) for k, v in net.state_dict().items())
    assert again["bn.num_batches_tracked"] == 1


def test_loading_a_sit_is_strict(saved):
    """`from_pretrained` fills what is missing with random numbers."""
    folder, file = saved
    state = load_file(file)
    state["blocks.9.new"] = state.pop("blocks.1.attn.qkv.bias")
    save_file(state, file)
    with pytest.raises(UserError) as caught:
        load_sit(folder)
    text = str(caught.value)
    assert "1 missing (blocks.1.attn.qkv.bias)" in text and "1 unexpected (blocks.9.new)" in text
    assert str(folder) in text and "\n" not in text


@pytest.mark.parametrize("fault", ["truncated", "no weights", "no config", "a VAE", "no folder"])
def test_what_holds_no_sit_is_refused_in_one_line(saved, fault):
    folder, file = saved
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "no weights":
        file.unlink()
    elif fault == "no config":
        (folder / "config.json").unlink()
    elif fault == "a VAE":
        (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    else:
        folder = folder / "absent"
    with pytest.raises(UserError) as caught:
        load_sit(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_position_embedding_is_never_trained():
    net = randomised()
    before = net.pos_embed.clone()
    assert "pos_embed" in net.state_dict()
    assert all(p is not net.pos_embed for p in net.parameters())
    net.requires_grad_(True)
    opt = torch.optim.SGD(net.parameters(), lr=1.0)
    v, feats = net(*inputs())
    (v.square().mean() + feats[0].square().mean()).backward()
    opt.step()
    assert not net.pos_embed.requires_grad and net.pos_embed.grad is None
    assert torch.equal(net.pos_embed, before)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_parameter_gets_a_gradient_in_a_full_pass(qk_norm):
    net = randomised(qk_norm=qk_norm, encoder_dims=(24, 40))
    v, feats = net(*inputs(num=11))
    (v.square().mean() + sum(f.square().mean() for f in feats)).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        # a constant added to all keys cancels in the softmax: that gradient is truly zero
        if not name.endswith("k_norm.bias"):
            assert p.grad.abs().max() > 1e-8, name
    table = net.y_embedder.embedding_table.weight.grad
    assert (table.abs().amax(dim=1) > 0).all()  # all 10 labels and the null one were in the batch


@pytest.mark.parametrize("stop_at_align", [False, True])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(stop_at_align):
    net, (x, t, y) = randomised(), inputs()

    def gradients():
        net.zero_grad()
        z = x.clone().requires_grad_()
        v, feats = net(z, t, y, stop_at_align)
        (feats[0].square().mean() + (0 if v is None else v.square().mean())).backward()
        return [z.grad, *(p.grad for p in net.parameters() if p.grad is not None)]

    plain, calls = gradients(), []
    net.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    net.enable_gradient_checkpointing()
    checkpointed = gradients()
    assert len(calls) == 2  # once forward, once again in backward
    assert len(plain) == len(checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bf16_autocast_stays_near_float32(qk_norm):
    net, batch = randomised(qk_norm=qk_norm), inputs()
    v, _ = net(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = net(*batch)
    assert (half.float() - v).norm() < 0.03 * v.norm()


def test_float64_time_is_embedded_as_its_float32_value():
    """The samplers keep their state in float64."""
    net, (x, t, y) = randomised(), inputs()
    assert torch.equal(net(x, t.double(), y)[0], net(x, t, y)[0])


@pytest.mark.parametrize("key", inspect.signature(SiT).parameters)
def test_a_wrong_entry_in_the_config_of_a_sit_is_one_line(saved, key):
    folder, _ = saved
    file = folder / "config.json"
    config = json.loads(file.read_text())
    wrong = (None, "x", -1, 10**9, 10**30, [], {}, [None], ["x"], [-1], float("nan"), [[1]])
    for value in wrong:
        if value == config[key]:
            continue
        file.write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError) as caught:
            load_sit(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    file.write_text(json.dumps({k: v for k, v in config.items() if k != key}))
    with pytest.raises(UserError, match=rf"does not say {key}"):
        load_sit(folder)
