"""VAEs in the files of others: single files, training checkpoints, variants, and other kinds.

The layouts are written from the published key names, independently of models/autoencoders/.
"""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.autoencoders.families import VAES
from models.autoencoders.stored import read_vae
from models.backbones.files import weights_in
from models.checks.errors import UserError
from models.vae import build_vae, load_vae, vae_weight_file
from tests.models.test_vae import F8D4, SHAPES, CompVisVAE
from tests.tiny import tiny_config
from utils.training.plan import check_vae_file

ONE = torch.ones(1)
UNET = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
CLIP = "transformer.text_model.embeddings.token_embedding.weight"
WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def nets() -> dict:
    torch.manual_seed(0)
    return {name: CompVisVAE(**SHAPES[name]).eval() for name in ("f8d4", "flux", "ldm-f4")}


@pytest.fixture(scope="module")
def states(nets) -> dict:
    return {name: net.state_dict() for name, net in nets.items()}


def below(prefix: str, state: dict) -> dict:
    return {f"{prefix}{key}": value for key, value in state.items()}


def lightning(state: dict) -> dict:
    """A checkpoint with a callback's class as a key, which only PyTorch Lightning can unpickle."""
    names = ("pytorch_lightning", "pytorch_lightning.callbacks")
    callback = type("ModelCheckpoint", (), {"__module__": names[1]})
    modules = {name: types.ModuleType(name) for name in names}
    vars(modules[names[1]])["ModelCheckpoint"] = callback
    sys.modules.update(modules)
    content = {"state_dict": state, "callbacks": {callback: {"best": 0.1}}, "epoch": 1}
    return content | {"hyper_parameters": {"embed_dim": 4}}


# wrapper of a VAE's tensors => content of a file that somebody has
WRAPPED = {
    "ldm": lambda s: lightning(s | {"loss.logvar": ONE, "loss.discriminator.main.0.weight": ONE}),
    "mar": lambda s: {"model": s},
    "va-vae": lambda s: {"state_dict": s | {"foundation_model.cls_token": ONE,
                                            "linear_proj.weight": ONE}},
    "stable diffusion": lambda s: {"state_dict": below("first_stage_model.", s)
                                   | {UNET: torch.ones(2, 768), "betas": ONE}},
    "latent diffusion on images": lambda s: {
        "state_dict": below("first_stage_model.", s)
        | below("cond_stage_model.", {k: v + 1 for k, v in s.items()})},
    "comfy": lambda s: below("vae.", s) | {"model.diffusion_model.double_blocks.0.x": ONE},
    "repa-e": lambda s: {"vae": below("_orig_mod.", s), "ema": {"x_embedder.proj.weight": ONE},
                         "model": {"module.x_embedder.proj.weight": ONE}, "steps": 4},
    "ddp and compile": lambda s: {"epoch": 3, "net": below("module._orig_mod.", s)},
    "with an average": lambda s: {"model": {k: v + 1 for k, v in s.items()}, "ema": s},
}  # fmt: skip


@pytest.mark.parametrize("layout", WRAPPED)
def test_the_vae_of_a_file_is_found(tmp_path, states, layout, capsys):
    content = WRAPPED[layout](states["f8d4"])
    torch.save(content, tmp_path / "plain.ckpt")
    torch.save(states["f8d4"], tmp_path / "bare.pt")
    found, _ = read_vae(tmp_path / "plain.ckpt")
    expected, _ = read_vae(tmp_path / "bare.pt", pytest.fail)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    told = capsys.readouterr().out
    assert (
        told.startswith(f"{tmp_path / 'plain.ckpt'}: its VAE is taken (") and told.count("\n") == 1
    )


def test_a_single_file_in_half_precision_is_the_same_vae(tmp_path, nets, states):
    half = {k: v.half() for k, v in below("first_stage_model.", states["f8d4"]).items()}
    save_file(half | {f"conditioner.embedders.0.{CLIP}": ONE}, tmp_path / "sdxl.safetensors")
    vae, x = load_vae(tmp_path / "sdxl.safetensors"), torch.rand(1, 3, 32, 32)
    assert vae.net.config.scaling_factor == 0.13025
    expected = CompVisVAE(**F8D4).eval()
    expected.load_state_dict({k: v.half().float() for k, v in states["f8d4"].items()})
    with torch.no_grad():
        moments = expected.moments(x)
        torch.testing.assert_close(vae.encode(x).parameters, moments, atol=1e-4, rtol=1e-4)
        z = moments.chunk(2, 1)[0]
        torch.testing.assert_close(vae.decode(z), expected.decode(z), atol=1e-4, rtol=1e-4)


SCALED = {
    "SD 1": ("f8d4", {f"cond_stage_model.{CLIP}": ONE}, 0.18215),
    "SD 2": ("f8d4", {"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": ONE}, 0.18215),
    "SDXL": ("f8d4", {f"conditioner.embedders.0.{CLIP}": ONE, UNET: torch.ones(2, 2048)}, 0.13025),
    "refiner": ("f8d4", {"conditioner.embedders.0.model.text_projection": ONE}, 0.13025),
    "SD 1, no text": ("f8d4", {UNET: torch.ones(2, 768)}, 0.18215),
    "SD 2, no text": ("f8d4", {UNET: torch.ones(2, 1024)}, 0.18215),
    "SDXL, no text": ("f8d4", {UNET: torch.ones(2, 2048)}, 0.13025),
    "SD 3": ("flux", {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": ONE}, 1.5305),
    "FLUX.1": ("flux", {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": ONE}, 0.3611),
    "LDM": ("f8d4", {"scale_factor": torch.tensor(0.25), f"cond_stage_model.{CLIP}": ONE}, 0.25),
    # not sure
    "alone": ("f8d4", {}, None),
    "ae.safetensors": ("flux", {}, None),
    "unknown text": ("f8d4", {UNET: torch.ones(2, 64)}, None),
    "Playground": ("f8d4", {"edm_mean": torch.zeros(4), "conditioner.embedders.0.x": ONE}, None),
    "x4 upscaler": ("ldm-f4", {"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": ONE},
                    None),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_the_scaling_of_latents_is_what_the_file_shows(tmp_path, states, kind):
    name, beside, factor = SCALED[kind]
    save_file(below("first_stage_model.", states[name]) | beside, tmp_path / "x.safetensors")
    _, scaling = read_vae(tmp_path / "x.safetensors", lambda line: None)
    assert scaling.get("scaling_factor") == (factor and pytest.approx(factor))
    assert (scaling.get("shift_factor") is not None) == (name == "flux" and factor is not None)


def test_the_plan_finds_a_vae_where_training_does(tmp_path, states):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": below("module.", build_vae("tiny-f2d4").net.state_dict())}, path)
    check_vae_file(tiny_config(f"vae.weights={path}"))
    check_vae_file(tiny_config(f"vae.name={path}", "vae.weights=hub"))
    torch.save(below("module.", states["f8d4"]), path)
    with pytest.raises(UserError, match=r"x\.ckpt do not fit the VAE"):
        check_vae_file(tiny_config(f"vae.weights={path}"))


def test_a_scaling_that_is_not_known_is_left_empty_and_said(tmp_path, states, capsys):
    path = tmp_path / "vae.pt"
    torch.save(states["f8d4"], path)
    config = load_vae(path).net.config
    assert config.scaling_factor is config.shift_factor is None
    told = capsys.readouterr().out
    assert "scaling_factor is left empty, as the file may be of sdvae or sdxl" in told
    load_vae(path).save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["scaling_factor"] is None
    assert (VAES["sdvae"].architecture, VAES["sdxl"].architecture) == ("f8d4", "f8d4")


def test_a_small_vae_of_the_table_has_its_number_of_norm_groups(tmp_path):
    vae, x = build_vae("tiny-f2d4"), torch.rand(1, 3, 8, 8)
    torch.save({"state_dict": vae.net.state_dict()}, tmp_path / "tiny.pt")
    assert torch.equal(load_vae(tmp_path / "tiny.pt").encode(x).mean, vae.encode(x).mean)
    qwen = build_vae("tiny-qwen")
    torch.save(qwen.net.state_dict(), tmp_path / "qwen.pt")
    again = load_vae(tmp_path / "qwen.pt")
    assert torch.equal(again.encode(x).mean, qwen.encode(x).mean) and again.latent_stats() is None
    narrow = CompVisVAE(**F8D4).state_dict()
    narrow["encoder.down.0.block.0.conv2.weight"] = torch.zeros(24, 24, 3, 3)
    torch.save(narrow, tmp_path / "narrow.pt")
    with pytest.raises(UserError, match=r"32 norm groups, .* do not divide 24 channels"):
        load_vae(tmp_path / "narrow.pt")


# ---------------------------------------------------------------- autoencoders of other kinds

KL = ("encoder.conv_in.weight", "decoder.conv_in.weight")
OTHERS = {
    "VQ autoencoder": [
        (*KL, "quantize.embedding.weight"),  # taming, latent-diffusion, LlamaGen, diffusers
        (*KL, "quantizer.codebook.weight"),
        ("first_stage_model.encoder.conv_in.weight",
         "first_stage_model.quantize.embedding.weight"),
    ],
    "FLUX.2's VAE": [
        (*KL, "quant_conv.weight", "bn.running_mean", "bn.running_var"),
        (*KL, "encoder.quant_conv.weight", "decoder.post_quant_conv.weight", "bn.running_mean"),
    ],
    "DC-AE": [
        ("encoder.project_in.conv.weight", "encoder.stages.0.op_list.0.main.conv1.conv.weight"),
        (*KL, "encoder.down_blocks.0.0.conv1.weight"),
    ],
    "tiny autoencoder": [
        ("0.weight", "1.conv.0.weight"),
        ("encoder.layers.0.weight", "encoder.layers.1.conv.0.weight"),
        ("taesd_encoder.0.weight", "taesd_encoder.1.conv.0.weight"),
    ],
    "consistency decoder": [("encoder.conv_in.weight", "decoder_unet.conv_in.weight")],
    "for inpainting": [(*KL, "decoder.condition_encoder.layers.0.weight")],
    "Wan's own names": [("encoder.conv1.weight", "decoder.middle.0.residual.0.gamma")],
    "Stable Video Diffusion": [
        (*KL, "decoder.mid.block_1.time_stack.in_layers.0.weight"),
        (*KL, "decoder.mid_block.resnets.0.temporal_res_block.norm1.weight"),
    ],
    "for videos": [
        ("encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight"),  # CogVideoX, Hunyuan, LTX
        ("vae.encoder.conv_in.conv.weight", "model.diffusion_model.patchify_proj.weight"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_autoencoders_of_other_kinds_are_refused_by_name(tmp_path, kind):
    for number, names in enumerate(OTHERS[kind]):
        path = tmp_path / f"{number}.pt"
        torch.save({"state_dict": dict.fromkeys(names, torch.ones(1, 1, 1, 1))}, path)
        with pytest.raises(UserError, match=rf"{number}.pt is .*{kind}.*expected an Auto"):
            load_vae(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [("AutoencoderDC", "DC-AE"), ("AutoencoderTiny", "tiny"), ("VQModel", "VQ"),
     ("AutoencoderKLFlux2", "FLUX.2"), ("AutoencoderKLWan", "for videos"),
     ("AutoencoderKLHunyuanVideo", "for videos"), ("UNet2DModel", "not a VAE"),
     ("AutoencoderKLQwenImage21", "of the class AutoencoderKLQwenImage21, which is not taken"),
     (None, "names no _class_name")],
)  # fmt: skip
def test_folders_of_other_classes_are_refused_by_name(tmp_path, name, words):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name} if name else {}))
    save_file({"encoder.conv_in.weight": ONE}, tmp_path / f"{WEIGHTS}.safetensors")
    with pytest.raises(UserError, match=rf"{words}.*expected") as caught:
        build_vae(tmp_path)
    assert "AutoencoderKL" in str(caught.value) and "\n" not in str(caught.value)


def test_a_generator_is_no_vae(tmp_path):
    torch.save({"ema": {"x_embedder.proj.weight": ONE, "bn.running_mean": ONE}}, tmp_path / "s.pt")
    with pytest.raises(UserError, match=r"a VAE: .*no tensors encoder\.conv_in\.weight.*ema\.x"):
        load_vae(tmp_path / "s.pt")


# ---------------------------------------------------------------- files of a diffusers folder


def sharded(folder, state: dict, end: str, save) -> None:
    names = sorted(state)
    index = {}
    for k, some in enumerate((names[:9], names[9:]), start=1):
        file = f"{WEIGHTS}-{k:05d}-of-00002.{end}"
        save({name: state[name] for name in some}, folder / file)
        index |= dict.fromkeys(some, file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / f"{WEIGHTS}.{end}.index.json").write_text(text)


FOLDERS = {
    "bin": lambda folder, s: torch.save(s, folder / f"{WEIGHTS}.bin"),
    "fp16": lambda folder, s: save_file(s, folder / f"{WEIGHTS}.fp16.safetensors"),
    "fp16 bin": lambda folder, s: torch.save(s, folder / f"{WEIGHTS}.fp16.bin"),
    "shards": lambda folder, s: sharded(folder, s, "safetensors", save_file),
    "shards of bin": lambda folder, s: sharded(folder, s, "bin", torch.save),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A diffusers folder without weights, and the weights, which float16 holds exactly."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    build_vae("tiny-f8d4").half().float().save(folder)
    state = load_file(folder / f"{WEIGHTS}.safetensors")
    (folder / f"{WEIGHTS}.safetensors").unlink()
    return folder, state


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_may_hold_its_weights_in_any_of_diffusers_files(tmp_path, tiny, kind):
    folder, state = tiny
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    half = {k: v.half() if "fp16" in kind else v for k, v in state.items()}
    FOLDERS[kind](tmp_path, half)
    loaded = load_vae(tmp_path).net.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_whole_numbers_go_before_variants_and_one_of_several_variants_must_be_named(tmp_path, tiny):
    folder, state = tiny
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    other = {k: v + 1 for k, v in state.items()}
    save_file(other, tmp_path / f"{WEIGHTS}.fp16.safetensors")
    save_file(other, tmp_path / f"{WEIGHTS}.non_ema.safetensors")
    with pytest.raises(UserError, match=r"variants fp16, non_ema only: .*\.fp16\.safetensors$"):
        load_vae(tmp_path)
    named = load_vae(tmp_path / f"{WEIGHTS}.fp16.safetensors")
    assert torch.equal(named.net.quant_conv.weight, other["quant_conv.weight"])
    torch.save(state, tmp_path / f"{WEIGHTS}.bin")
    assert torch.equal(load_vae(tmp_path).net.quant_conv.weight, state["quant_conv.weight"])


def test_a_folder_of_the_hubs_cache_is_its_main_branch(tmp_path, tiny):
    folder, _ = tiny
    for revision in ("aaa", "bbb"):
        (at := tmp_path / "snapshots" / revision).mkdir(parents=True)
        (at / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("bbb")
    file = vae_weight_file(str(tmp_path))
    assert file and file.path == at / f"{WEIGHTS}.safetensors"


@pytest.mark.parametrize(
    ("mark", "words"), [(".metadata", "dcp_to_torch"), ("zero_to_fp32.py", "its own zero_to_fp32")]
)
def test_a_training_checkpoint_in_parts_says_how_to_make_one_file_of_it(tmp_path, mark, words):
    (tmp_path / mark).write_text("")
    for find in (vae_weight_file, weights_in):
        with pytest.raises(UserError, match=f"in parts: make one file of it with .*{words}"):
            find(tmp_path)


def test_a_folder_that_is_no_vae_names_the_weight_files_in_it(tmp_path):
    (tmp_path / "e2e-vavae-400k.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"no config\.json .* name a file: e2e-vavae-400k\.pt"):
        load_vae(tmp_path)
