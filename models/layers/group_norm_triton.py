"""Group norm and SiLU as Triton kernels, for CUDA tensors whose channels lie innermost.

A tensor (N, C, ...) is seen as (N, R, C), R = rows of C channels each. Every kernel computes in
float32, whatever the format of the tensors; sizes that are no multiples of a block are masked.

    forward   _moments (reads x), _statistics, _normalize (reads x, writes y)
    backward  _gradient_sums (reads x, dy), _group_sums, _input_gradient (reads both, writes dx)

In between lie only sums of chunks of rows. x_hat = (x - mean) rstd, g = x_hat weight + bias,
y = silu(g).
"""

# pyright: reportArgumentType=false
# Triton takes plain numbers for its constexpr parameters.

import torch
import triton
import triton.language as tl

ELEMENTS = 4096  # of a block that one program holds in registers
PROGRAMS = 1056  # 8 for each of the 132 multiprocessors of an H100: enough to hide latency
PARTS = 16  # partial sums that are read at a time


@triton.jit
def _moments(x, partial, rows, channels, chunk, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of one chunk of rows of one image: for each channel, the sums of x - x_0 and of its square,
    x_0 being the channel's first value. The shift keeps the digits of a variance that is much
    smaller than the squared mean."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    x += n * rows * channels
    origin = tl.load(x + c, mask=c < channels, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for start in range(part * chunk, part * chunk + chunk, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r[:, None] < rows) & (c[None, :] < channels)
        value = tl.load(x + r[:, None] * channels + c[None, :], mask=mask, other=0.0)
        value = tl.where(mask, value.to(tl.float32) - origin[None, :], 0.0)
        total += tl.sum(value, axis=0)
        squares += tl.sum(value * value, axis=0)
    out = partial + (n * tl.num_programs(1) + part) * 2 * channels + c
    tl.store(out, total, mask=c < channels)
    tl.store(out + channels, squares, mask=c < channels)


@triton.jit
def _statistics(
    x, partial, mean, rstd, rows, channels, width, parts, eps,
    PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of one group, of `width` channels, of one image."""
    n, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    c = group * width + d
    total, squares = _sum_parts(partial, n, c, d < width, channels, parts, PARTS, BLOCK_D)
    origin = tl.load(x + n * rows * channels + c, mask=d < width, other=0.0).to(tl.float32)
    means = total / rows
    inside = tl.sum(squares - total * means)  # around the mean of each channel
    own = tl.where(d < width, origin + means, 0.0)
    centre = tl.sum(own) / width
    between = tl.sum(tl.where(d < width, (own - centre) * (own - centre), 0.0))
    variance = tl.maximum(inside / (rows * width) + between / width, 0.0)
    at = n * tl.num_programs(1) + group
    tl.store(mean + at, centre)
    tl.store(rstd + at, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _sum_parts(partial, n, c, mask, channels, parts, PARTS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The two sums of every chunk, added up, for the channels `c` of image `n`."""
    first = tl.zeros([BLOCK_D], tl.float32)
    second = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        at = partial + (n * parts + part[:, None]) * 2 * channels + c[None, :]
        here = (part[:, None] < parts) & mask[None, :]
        first += tl.sum(tl.load(at, mask=here, other=0.0), axis=0)
        second += tl.sum(tl.load(at + channels, mask=here, other=0.0), axis=0)
    return first, second


@triton.jit
def _load_normalized(x, mean, rstd, weight, bias, n, r, c, mask, rows, channels, groups, width):
    """x_hat and g of a block, and weight and rstd of its channels, for image `n`."""
    inside = c < channels
    at = n * groups + c // width
    centre = tl.load(mean + at, mask=inside, other=0.0)
    scale = tl.load(rstd + at, mask=inside, other=0.0)
    gain = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(
        x + n * rows * channels + r[:, None] * channels + c[None, :], mask=mask, other=0.0
    )
    x_hat = (value.to(tl.float32) - centre[None, :]) * scale[None, :]
    return x_hat, x_hat * gain[None, :] + shift[None, :], gain, scale


@triton.jit
def _normalize(
    x, mean, rstd, weight, bias, y, rows, channels, groups, width,
    SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    r, c = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    mask = (r[:, None] < rows) & (c[None, :] < channels)
    _, g, _, _ = _load_normalized(
        x, mean, rstd, weight, bias, n, r, c, mask, rows, channels, groups, width
    )
    if SILU:
        g = g * tl.sigmoid(g)
    y += n * rows * channels
    tl.store(y + r[:, None] * channels + c[None, :], g.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _load_gradient(dy, g, n, r, c, mask, rows, channels, SILU: tl.constexpr):
    """dg of a block: the gradient of g from that of y."""
    grad = tl.load(
        dy + n * rows * channels + r[:, None] * channels + c[None, :], mask=mask, other=0.0
    )
    grad = grad.to(tl.float32)
    if SILU:
        s = tl.sigmoid(g)
        grad = grad * s * (1.0 + g * (1.0 - s))
    return grad


@triton.jit
def _gradient_sums(
    x, dy, mean, rstd, weight, bias, partial, rows, channels, groups, width, chunk,
    SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of one chunk of rows of one image: for each channel, the sums of dg and of dg x_hat."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    first = tl.zeros([BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_C], tl.float32)
    for start in range(part * chunk, part * chunk + chunk, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (r[:, None] < rows) & (c[None, :] < channels)
        x_hat, g, _, _ = _load_normalized(
            x, mean, rstd, weight, bias, n, r, c, mask, rows, channels, groups, width
        )
        dg = _load_gradient(dy, g, n, r, c, mask, rows, channels, SILU)  # 0 outside
        first += tl.sum(dg, axis=0)
        second += tl.sum(dg * x_hat, axis=0)
    out = partial + (n * tl.num_programs(1) + part) * 2 * channels + c
    tl.store(out, first, mask=c < channels)
    tl.store(out + channels, second, mask=c < channels)


@triton.jit
def _group_sums(
    partial, weight, of_image, of_group, rows, channels, width, parts,
    PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """of_image (N, 2, C): the gradients of bias and weight that one image contributes. of_group
    (N, G, 2): the means over a group of weight dg and of weight dg x_hat."""
    n, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    c = group * width + d
    first, second = _sum_parts(partial, n, c, d < width, channels, parts, PARTS, BLOCK_D)
    out = of_image + n * 2 * channels + c
    tl.store(out, first, mask=d < width)
    tl.store(out + channels, second, mask=d < width)
    gain = tl.load(weight + c, mask=d < width, other=0.0).to(tl.float32)
    out = of_group + (n * tl.num_programs(1) + group) * 2
    tl.store(out, tl.sum(gain * first) / (rows * width))
    tl.store(out + 1, tl.sum(gain * second) / (rows * width))


@triton.jit
def _input_gradient(
    x, dy, mean, rstd, weight, bias, of_group, dx, rows, channels, groups, width,
    SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    r, c = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    mask = (r[:, None] < rows) & (c[None, :] < channels)
    x_hat, g, gain, scale = _load_normalized(
        x, mean, rstd, weight, bias, n, r, c, mask, rows, channels, groups, width
    )
    dg = _load_gradient(dy, g, n, r, c, mask, rows, channels, SILU)
    at = of_group + (n * groups + c // width) * 2
    first = tl.load(at, mask=c < channels, other=0.0)
    second = tl.load(at + 1, mask=c < channels, other=0.0)
    grad = scale[None, :] * (gain[None, :] * dg - first[None, :] - x_hat * second[None, :])
    dx += n * rows * channels
    tl.store(dx + r[:, None] * channels + c[None, :], grad.to(dx.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------
# The launches.


def fits(x: torch.Tensor) -> bool:
    """Whether the channels of x (N, C, ...) lie innermost in memory, without gaps, and the numbers
    of one image can be counted in 32 bits."""
    inside = 0 < x.numel() < 2**31 * len(x)
    return inside and x.ndim > 2 and x.movedim(1, -1).is_contiguous()


def _split(x: torch.Tensor) -> tuple[int, int, int, dict[str, int]]:
    """(rows R, rows of a chunk, chunks) of x (N, C, ...), and the sizes of blocks."""
    rows = x[0, 0].numel()
    block_c = triton.next_power_of_2(x.shape[1])
    block_r = max(1, ELEMENTS // block_c)
    blocks = triton.cdiv(rows, block_r)
    chunk = triton.cdiv(blocks, min(blocks, triton.cdiv(PROGRAMS, len(x)))) * block_r
    return rows, chunk, triton.cdiv(rows, chunk), {"BLOCK_R": block_r, "BLOCK_C": block_c}


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (N, C, ...) that `fits` => y like x, mean and rstd (N, G) float32."""
    num, channels = x.shape[:2]
    width, (rows, chunk, parts, blocks) = channels // groups, _split(x)
    partial = x.new_empty((num, parts, 2, channels), dtype=torch.float32)
    mean = x.new_empty((num, groups), dtype=torch.float32)
    rstd, y = torch.empty_like(mean), torch.empty_like(x)
    _moments[(num, parts)](x, partial, rows, channels, chunk, **blocks)
    block_d = triton.next_power_of_2(width)
    about = (mean, rstd, rows, channels, width, parts, eps)
    _statistics[(num, groups)](x, partial, *about, PARTS=PARTS, BLOCK_D=block_d)
    grid = (triton.cdiv(rows, blocks["BLOCK_R"]), num)
    shape = (rows, channels, groups, width)
    _normalize[grid](x, mean, rstd, weight, bias, y, *shape, SILU=silu, **blocks)
    return y, mean, rstd


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient dy of y, laid out like x => those of x, weight (C,) and bias (C,), float32."""
    num, channels = x.shape[:2]
    width, (rows, chunk, parts, blocks) = channels // groups, _split(x)
    partial = x.new_empty((num, parts, 2, channels), dtype=torch.float32)
    of_image = x.new_empty((num, 2, channels), dtype=torch.float32)
    of_group = x.new_empty((num, groups, 2), dtype=torch.float32)
    dx = torch.empty_like(x)
    shape, inputs = (rows, channels, groups, width), (x, dy, mean, rstd, weight, bias)
    _gradient_sums[(num, parts)](*inputs, partial, *shape, chunk, SILU=silu, **blocks)
    about = (of_image, of_group, rows, channels, width, parts)
    block_d = triton.next_power_of_2(width)
    _group_sums[(num, groups)](partial, weight, *about, PARTS=PARTS, BLOCK_D=block_d)
    grid = (triton.cdiv(rows, blocks["BLOCK_R"]), num)
    _input_gradient[grid](*inputs, of_group, dx, *shape, SILU=silu, **blocks)
    d_bias, d_weight = of_image.sum(0)
    return dx, d_weight, d_bias
