"""Group norm with SiLU in half precision: against the formula in float64, on every path."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from models.layers.group_norm import GroupNorm, GroupNormSiLU, _GroupNormSiLU, group_norm_silu
from models.vae import build_vae

# relative errors: half an ulp of the output's format, and what sums in float32 add
ROUNDING = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}
CASES = [
    # format, (N, C, H, W), groups, SiLU, mean of the input
    (torch.float32, (2, 32, 8, 8), 8, True, 0.0),
    (torch.bfloat16, (2, 64, 16, 16), 32, True, 0.0),
    (torch.bfloat16, (3, 24, 5, 7), 8, True, 3.0),
    (torch.float16, (1, 8, 5, 7), 4, False, 50.0),
]


def inputs(dtype, shape, mean):
    torch.manual_seed(0)
    x, dy = torch.randn(shape) + mean, torch.randn(shape)
    x, dy = (t.to(dtype).to(memory_format=torch.channels_last) for t in (x, dy))
    return x, dy, torch.randn(shape[1]), torch.randn(shape[1])


def by_the_formula(x, dy, weight, bias, groups, silu):
    """y and the gradients of x, weight and bias, in float64."""
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.group_norm(leaves[0], groups, *leaves[1:], eps=1e-6)
    y = F.silu(y) if silu else y
    return y, *torch.autograd.grad(y, leaves, dy.double())


def error(found, wanted) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(("dtype", "shape", "groups", "silu", "mean"), CASES)
def test_value_and_gradients_are_those_of_the_formula(dtype, shape, groups, silu, mean):
    x, dy, weight, bias = inputs(dtype, shape, mean)
    wanted = by_the_formula(x, dy, weight, bias, groups, silu)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = _GroupNormSiLU.apply(*leaves, groups, 1e-6, silu)
    y.backward(dy)
    assert y.dtype == dtype and y.stride() == x.stride()
    for found, exact in zip((y, *(leaf.grad for leaf in leaves)), wanted):
        assert error(found, exact) < ROUNDING[dtype]


def test_the_operation_tells_torch_the_truth_about_itself():
    x, _, weight, bias = inputs(torch.float32, (2, 8, 4, 4), 0.0)
    arguments = (x, weight, bias, 4, 1e-6, True)
    torch.library.opcheck(group_norm_silu, arguments, test_utils=("test_schema", "test_faketensor"))


KERNELS = """
import pickle, sys, torch
from models.layers import group_norm_triton as kernels
case = pickle.load(open(sys.argv[1], "rb"))
found = []
for x, dy, weight, bias, groups, silu in case:
    y, mean, rstd = kernels.forward(x, weight, bias, groups, 1e-6, silu)
    found.append((y, *kernels.backward(dy, x, mean, rstd, weight, bias, groups, silu)))
torch.save(found, sys.argv[2])
"""


def test_the_cuda_kernels_compute_the_formula(tmp_path):
    """They run in Triton's interpreter here. The last case has many images' worth of rows, a mean
    of a thousand deviations, and sizes that fill no block."""
    pytest.importorskip("triton")
    import pickle

    cases = [*CASES, (torch.float32, (2, 16, 9, 1), 4, True, 1000.0)]
    cases = [(*inputs(c[0], c[1], c[4]), c[2], c[3]) for c in cases]
    (tmp_path / "in").write_bytes(pickle.dumps(cases))
    command = [sys.executable, "-c", KERNELS, str(tmp_path / "in"), str(tmp_path / "out")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run(command, env=environment, check=True, timeout=300)
    for case, found in zip(cases, torch.load(tmp_path / "out", weights_only=True)):
        x, shifted = case[0], case[0].float().mean() > 100
        assert found[0].dtype == x.dtype and found[0].stride() == x.stride()
        for value, exact in zip(found, by_the_formula(*case)):
            assert error(value, exact) < (1e-4 if shifted else ROUNDING[x.dtype])


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_the_cuda_kernels_compile_for_gpus(arch):
    """Down to machine code, for the formats and sizes of the SD-VAE; this needs no GPU."""
    pytest.importorskip("triton")
    code = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models.layers import group_norm_triton as kernels
sizes = {"BLOCK_R": 16, "BLOCK_C": 256, "SILU": True, "PARTS": 16, "BLOCK_D": 8}
whole = ("rows", "channels", "groups", "width", "chunk", "parts")
types = dict.fromkeys(("x", "dy", "dx", "y"), "*bf16") | {"eps": "fp32"}
types |= dict.fromkeys(whole, "i32") | dict.fromkeys(sizes, "constexpr")
names = ("_moments", "_statistics", "_normalize")
names += ("_gradient_sums", "_group_sums", "_input_gradient")
for kernel in (getattr(kernels, name) for name in names):
    arguments = [p.name for p in kernel.params]
    signature = {name: types.get(name, "*fp32") for name in arguments}
    source = ASTSource(kernel, signature, {n: v for n, v in sizes.items() if n in arguments})
    assert triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm["cubin"]
"""
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run(
        [sys.executable, "-c", code, str(arch)], env=environment, check=True, timeout=300
    )


@pytest.mark.parametrize("side", [1024, 2048])
def test_large_images_are_within_the_grid_of_cuda(side, monkeypatch):
    """CUDA counts to 2^31 - 1 in a grid's first direction and to 65,535 in the others; the decoder
    of the SD-VAE has 256 channels at full resolution. On tensors without content."""
    kernels = pytest.importorskip("models.layers.group_norm_triton")
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **sizes: None

    names = "_moments", "_statistics", "_normalize"
    for name in (*names, "_gradient_sums", "_group_sums", "_input_gradient"):
        monkeypatch.setattr(kernels, name, Recorder())
    x = torch.empty(4, 256, side, side, device="meta").to(memory_format=torch.channels_last)
    weight = torch.empty(256, device="meta")
    assert kernels.fits(x)
    y, *stats = kernels.forward(x, weight, weight, 32, 1e-6, True)
    kernels.backward(y, x, *stats, weight, weight, 32, True)
    assert len(grids) == 6 and all(g[0] < 2**31 and max(g[1:]) < 2**16 for g in grids)


def test_what_the_kernels_cannot_count_is_left_to_torch():
    kernels = pytest.importorskip("models.layers.group_norm_triton")
    for shape, fits in (((2, 512, 2048, 2048), False), ((0, 8, 4, 4), False), ((1, 8, 1, 1), True)):
        x = torch.empty(shape, device="meta").to(memory_format=torch.channels_last)
        assert kernels.fits(x) == fits
    x, weight = torch.empty(0, 8, 4, 4), torch.ones(8)
    assert _GroupNormSiLU.apply(x, weight, weight, 4, 1e-6, True).shape == x.shape


def test_on_cuda_nothing_is_cast_or_laid_out_anew():
    """Counted on CUDA tensors without content."""
    with FakeTensorMode():
        norm = GroupNormSiLU(8, 32, device="cuda")
        x = torch.empty(2, 32, 16, 16, device="cuda", dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last)
        y = norm(x)
        assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)


def test_without_autocast_a_vae_gives_the_numbers_of_plain_diffusers():
    from diffusers import AutoencoderKL

    vae = build_vae("tiny-f16d32").eval()
    plain = AutoencoderKL.from_config(vae.net.config).eval()
    plain.load_state_dict(vae.net.state_dict())
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        z = vae.encode(x).mean
        assert torch.equal(z, plain.encode(x).latent_dist.mean)
        assert torch.equal(vae.decode(z), plain.decode(z).sample)
    kinds = {type(m) for m in vae.modules() if isinstance(m, nn.GroupNorm)}
    assert kinds == {GroupNorm, GroupNormSiLU}


@pytest.mark.parametrize("name", ["tiny-f8d4", "tiny-f8d16", "tiny-qwen"])
def test_under_autocast_moments_and_images_do_not_lie_on_the_grid_of_bfloat16(name):
    vae, x = build_vae(name).eval(), torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        posterior, z, x_hat = vae(x)
    for values in (posterior.mean, posterior.logvar, z, x_hat):
        assert values.dtype == torch.float32
        assert (values != values.bfloat16().float()).float().mean() > 0.9
