"""Layers that compute in half precision where that only rounds, and in float32 where it matters.

autocast.py           layers that leave autocast; norms, sums and weights of half tokens
group_norm.py         group norm with SiLU: half in and out, float32 statistics
group_norm_triton.py  its kernels for CUDA
kl_blocks.py          what is exchanged in a diffusers AutoencoderKL
"""
