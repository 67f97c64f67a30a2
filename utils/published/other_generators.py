"""Generators of other projects, told by names of tensors that only they have.

None of them can be imported: this project has no such network. The names are facts of the public
repositories, read in November 2026.
"""

from collections.abc import Iterable

# (what it is, names of tensors: each alternative is a tuple of names that are all there). The first
# row that fits is taken: most of these hold SiT's names, too.
GENERATORS: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    ("a DDT, or RAE's DiT with a DDT head", (("s_embedder.proj.weight",),)),
    ("a JiT, which works on pixels", (("x_embedder.proj1.weight",), ("in_context_posemb",))),
    ("REG's SiT, which also denoises a class token", (("final_layer.linear_cls.weight",),)),
    ("a MeanFlow network, which takes two times", (("r_embedder.mlp.0.weight",),)),
    ("an MDT", (("sideblocks.0.attn.qkv.weight",), ("en_inblocks.0.attn.qkv.weight",))),
    ("a MaskDiT", (("decoder_layer.linear.weight", "decoder_blocks.0.attn.qkv.weight"),)),
    ("a LightningDiT", (
        ("x_embedder.proj.weight", "blocks.0.mlp.w12.weight"),
        ("x_embedder.proj.weight", "feat_rope.freqs_cos"),
        ("x_embedder.proj.weight", "final_layer.norm_final.weight"),
    )),
    ("a U-ViT", (("mid_block.attn.qkv.weight", "in_blocks.0.attn.qkv.weight"),)),
    ("an MAR", (("diffloss.net.cond_embed.weight",), ("encoder_pos_embed_learned",))),
    ("a PixArt", (
        ("blocks.0.cross_attn.q_linear.weight",),
        ("adaln_single.linear.weight", "pos_embed.proj.weight"),
    )),
    ("a DiT in the layout of diffusers, which predicts noise", (
        ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",),
    )),
    ("a FLUX transformer", (
        ("double_blocks.0.img_attn.qkv.weight",),
        ("single_transformer_blocks.0.proj_out.weight", "x_embedder.weight"),
        ("single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",),
    )),
    ("a Stable Diffusion 3 transformer", (
        ("joint_blocks.0.x_block.attn.qkv.weight",),
        ("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"),
    )),
    ("a Qwen-Image transformer", (("transformer_blocks.0.img_mod.1.weight",),)),
    ("a Wan video transformer", (
        ("blocks.0.self_attn.q.weight", "patch_embedding.weight"),
        ("blocks.0.attn1.to_q.weight", "patch_embedding.weight"),
    )),
    ("a VAR", (("blocks.0.ada_lin.1.weight", "word_embed.weight"),)),
    ("a diffusion U-Net", (
        ("input_blocks.0.0.weight", "out.2.weight"),
        ("down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"),
    )),
    ("a vision transformer, for encoder.weights", (
        ("patch_embed.proj.weight", "cls_token"),
        ("embeddings.patch_embeddings.projection.weight",),
        ("embeddings.patch_embedding.weight",),
        ("visual.conv1.weight",),
    )),
    ("a discriminator, for --discriminator", (("main.0.weight", "main.2.weight"),)),
)  # fmt: skip


def name_generator(names: Iterable[str]) -> str | None:
    """What the network with these names of tensors is, e.g. "a LightningDiT"; None if none of the
    table. Whatever stands before a name, up to a dot, is taken for a wrapper's prefix."""
    endings = {".".join(parts[i:]) for name in names for parts in [name.split(".")]
               for i in range(len(parts))}  # fmt: skip
    return next(
        (what for what, kinds in GENERATORS if any(endings.issuperset(kind) for kind in kinds)),
        None,
    )
