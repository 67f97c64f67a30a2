"""Generators of other projects are named, those of this one are not."""

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from models.checks.errors import UserError
from tests.published_files import compvis_vae, disc_state, first_release, sit_state
from utils.published.files import read_published
from utils.published.other_generators import name_generator

# those that diffusers has, each as small as it can be
CLASSES = {
    "DiTTransformer2DModel": "a DiT in the layout of diffusers",
    "PixArtTransformer2DModel": "a PixArt",
    "SD3Transformer2DModel": "a Stable Diffusion 3 transformer",
    "FluxTransformer2DModel": "a FLUX transformer",
    "QwenImageTransformer2DModel": "a Qwen-Image transformer",
    "WanTransformer3DModel": "a Wan video transformer",
}
# beside the names of a SiT
LIKE_SIT = {
    "blocks.0.mlp.w12.weight": "a LightningDiT",
    "feat_rope.freqs_cos": "a LightningDiT",
    "final_layer.norm_final.weight": "a LightningDiT",
    "s_embedder.proj.weight": "a DDT, or RAE",
    "final_layer.linear_cls.weight": "REG",
    "r_embedder.mlp.0.weight": "a MeanFlow network",
    "blocks.0.cross_attn.q_linear.weight": "a PixArt",
    "decoder_layer.linear.weight decoder_blocks.0.attn.qkv.weight": "a MaskDiT",
}
ALONE = {
    "x_embedder.proj1.weight x_embedder.proj2.weight blocks.0.mlp.w12.weight": "a JiT",
    "en_inblocks.0.attn.qkv.weight sideblocks.0.attn.qkv.weight": "an MDT",
    "in_blocks.0.attn.qkv.weight mid_block.attn.qkv.weight": "a U-ViT",
    "encoder_blocks.0.attn.qkv.weight diffloss.net.cond_embed.weight": "an MAR",
    "double_blocks.0.img_attn.qkv.weight img_in.weight": "a FLUX transformer",
    "joint_blocks.0.x_block.attn.qkv.weight": "a Stable Diffusion 3 transformer",
    "input_blocks.0.0.weight out.2.weight": "a diffusion U-Net",
    "cls_token patch_embed.proj.weight blocks.0.attn.qkv.weight": "a vision transformer",
}


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_of_diffusers(name):
    network = getattr(diffusers, name)
    depth = {"num_single_layers": 1} if name.startswith("Flux") else {}
    with torch.device("meta"):
        state = network(num_layers=1, **depth).state_dict()
    assert name_generator(state).startswith(CLASSES[name])


@pytest.mark.parametrize("prefix", ["", "module.", "model.diffusion_model."])
def test_others_by_names_that_only_they_have(prefix):
    for names, known in (LIKE_SIT | ALONE).items():
        found = [*names.split(), *(sit_state(1, bn=False) if names in LIKE_SIT else ())]
        assert name_generator(f"{prefix}{name}" for name in found).startswith(known)


def test_what_can_be_imported_has_no_other_name():
    for state in (sit_state(1), sit_state(1, qk_norm=True), first_release(sit_state(1))):
        assert name_generator(state) is None
    assert name_generator(compvis_vae().state_dict()) is None
    assert name_generator(disc_state()).startswith("a discriminator")


def test_the_refusal_is_one_line_that_names_it(tmp_path):
    for names, known in (LIKE_SIT | ALONE).items():
        state = sit_state(1, bn=False) if names in LIKE_SIT else {}
        save_file(state | {name: torch.ones(1) for name in names.split()}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=f"is {known}.*: this project has no such network") as e:
            read_published(tmp_path / "x.pt")
        assert "\n" not in str(e.value)
