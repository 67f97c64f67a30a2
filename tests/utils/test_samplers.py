"""The samplers: equal to loops written from the method's text, exact where the answer is known.

    python -m pytest tests/utils/test_samplers.py        (CPU, no network)

Two kinds of network: a small SiT with random weights, for which every solver is repeated here in
plain loops of float64 numbers; and the exact velocity of Gaussian data, for which the solution of
the ODE and the moments of the SDE are known in closed form.
"""

import copy
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.checks.errors import UserError
from models.sit import SiT
from utils import samplers
from utils.pictures.solvers import gaussian_error
from utils.samplers import (
    HEUN_GUIDANCE,
    PRESETS,
    SDE_LAST_TIME,
    SOLVERS,
    Solver,
    least_steps,
    network_calls,
    ode_times,
    rows_of_calls,
    sample,
    sde_times,
    shift_time,
)
from utils.sampling.noise import ImageNoise

CLASSES = 3


# ---------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def sit():
    """Random weights everywhere: at its own initialisation a SiT answers zero."""
    torch.manual_seed(0)
    sit = SiT(8, 2, 4, hidden_size=32, depth=2, num_heads=2, num_classes=CLASSES, encoder_dims=())
    for p in sit.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return sit.eval()


@pytest.fixture
def start():
    g = torch.Generator().manual_seed(1)
    return torch.randn(5, 4, 8, 8, generator=g), torch.tensor([0, 1, 2, 0, 1])


class Counting(torch.nn.Module):
    """Notes the time, dtype and labels of every call of a network."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, []
        self.null_label = getattr(net, "null_label", None)

    def forward(self, x, t, y):
        self.calls.append(SimpleNamespace(t=float(t[0]), x=x, y=y.tolist(), dtype=x.dtype))
        return self.net(x, t, y)


class Gaussian(torch.nn.Module):
    """The exact velocity of the linear path for data N(mean, std^2), per coordinate.

    x_t = (1 - t) z + t eps is normal with mean (1 - t) m and variance (1 - t)^2 s^2 + t^2. Its
    probability flow moves x_1 = e to m + s e: noise is carried to data along quantiles.
    """

    def __init__(self, mean=0.7, std=0.4):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x, t, y):
        t = t.view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        slope = (t - (1 - t) * self.std**2) / variance
        return -self.mean + slope * (x - (1 - t) * self.mean), []

    def solution(self, noise):
        return self.mean + self.std * noise.double()


# ---------------------------------------------------------------- loops from the method's text


def alpha_sigma(t, path):
    if path == "linear":
        return 1 - t, t, -1.0, 1.0
    a = math.pi * t / 2
    return math.cos(a), math.sin(a), -math.pi / 2 * math.sin(a), math.pi / 2 * math.cos(a)


class Reference:
    """One call of the network per branch, times as Python floats."""

    def __init__(self, sit, y, cfg, low, high, path):
        self.sit, self.y, self.cfg, self.low, self.high, self.path = sit, y, cfg, low, high, path
        self.null = torch.full_like(y, CLASSES)

    def velocity(self, x, t, y):
        with torch.no_grad():
            return self.sit(x.float(), torch.full((len(x),), t), y)[0].double()

    def drift(self, v, x, t):
        alpha, sigma, d_alpha, d_sigma = alpha_sigma(t, self.path)
        score = (alpha / d_alpha * v - x) / (sigma**2 - alpha / d_alpha * d_sigma * sigma)
        return v - 0.5 * (2 * t) * score

    def guided(self, x, t, of):
        cond = of(self.velocity(x, t, self.y), x, t)
        if self.cfg == 1 or not self.low <= t <= self.high:
            return cond
        uncond = of(self.velocity(x, t, self.null), x, t)
        return uncond + self.cfg * (cond - uncond)

    def ode(self, x, steps, heun):
        times = [1 - i / steps for i in range(steps + 1)]
        x, plain = x.double(), lambda v, x, t: v
        for i, (t, t_next) in enumerate(pairwise(times)):
            d = self.guided(x, t, plain)
            end = x + (t_next - t) * d
            if heun and i < steps - 1:
                end = x + (t_next - t) * (d + self.guided(end, t_next, plain)) / 2
            x = end
        return x

    def sde(self, x, steps, draw):
        times = [1 - 0.96 * i / (steps - 1) for i in range(steps)]
        x = x.double()
        for t, t_next in pairwise(times):
            d, size = self.guided(x, t, self.drift), abs(t_next - t)
            x = x + d * (t_next - t) + math.sqrt(2 * t) * math.sqrt(size) * draw()
        return x + self.guided(x, times[-1], self.drift) * (0 - times[-1])


@pytest.mark.parametrize("steps", [5, 12])
def test_every_bit_of_plain_loops(steps, sit, start):
    """Samples of old releases come out again, byte by byte: no rounding may change."""
    noise, y = start

    @torch.no_grad()
    def velocity(x, t):
        return sit(x.float(), t.float().expand(len(x)), y)[0].double()

    x = noise.double()
    for t, t_next in pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64)):
        x = x + (t_next - t) * velocity(x, t)
    assert torch.equal(sample(sit, noise, y, solver="ode-euler", steps=steps), x.float())
    x, g = noise.double(), torch.Generator().manual_seed(5)
    times = torch.linspace(1, SDE_LAST_TIME, steps, dtype=torch.float64)
    for i, t in enumerate(times):
        v, ratio = velocity(x, t), (1 - t) / -torch.ones_like(t)
        drift = v - t * ((ratio * v - x) / (t**2 - ratio * torch.ones_like(t) * t))
        if i == steps - 1:
            x = x - t * drift
            break
        dt = times[i + 1] - t
        fresh = torch.randn(x.shape, dtype=torch.float64, generator=g)
        x = x + dt * drift + (2 * t * dt.abs()).sqrt() * fresh
    again = torch.Generator().manual_seed(5)
    found = sample(sit, noise, y, solver="sde", steps=steps, generator=again)
    assert torch.equal(found, x.float())


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize(("cfg", "low", "high"), [(1, 0, 1), (2.5, 0, 1), (2.5, 0.21, 0.66)])
class TestAgainstTheMethod:
    def compare(self, solver, expected, sit, start, cfg, low, high, path, generator=None):
        noise, y = start
        ours = sample(
            sit, noise, y, solver=solver, steps=9, cfg_scale=cfg, guidance=(low, high), path=path,
            generator=generator,
        )  # fmt: skip
        assert ours.dtype == torch.float32
        # the network is float32; guidance and nine steps enlarge its rounding, CPUs round apart
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("solver", ["ode-euler", "ode-heun"])
    def test_ode(self, solver, sit, start, cfg, low, high, path):
        reference = Reference(sit, start[1], cfg, low, high, path)
        expected = reference.ode(start[0], 9, heun=solver == "ode-heun")
        self.compare(solver, expected, sit, start, cfg, low, high, path)

    def test_sde_with_one_generator_draws_the_batch_at_once(self, sit, start, cfg, low, high, path):
        g = torch.Generator().manual_seed(5)
        reference = Reference(sit, start[1], cfg, low, high, path)
        shape = start[0].shape
        draw = lambda: torch.randn(shape, dtype=torch.float64, generator=g)  # noqa: E731
        expected = reference.sde(start[0], 9, draw)
        again = torch.Generator().manual_seed(5)
        self.compare("sde", expected, sit, start, cfg, low, high, path, again)

    def test_sde_with_the_noise_of_images(self, sit, start, cfg, low, high, path):
        noise, reference = ImageNoise(7, range(5)), Reference(sit, start[1], cfg, low, high, path)
        draws = (noise(start[0].double(), number) for number in range(1, 9))
        expected = reference.sde(start[0], 9, lambda: next(draws))
        self.compare("sde", expected, sit, start, cfg, low, high, path, ImageNoise(7, range(5)))


# ---------------------------------------------------------------- the exact field


def error(solver, steps, shift=1.0):
    """Root mean square distance from the exact solution, and the number of network calls."""
    net = Counting(Gaussian())
    noise = torch.linspace(-2, 2, 64).view(1, 1, 8, 8)
    x = sample(net, noise, torch.zeros(1).long(), solver=solver, steps=steps, shift=shift)
    return float((x - net.net.solution(noise)).square().mean().sqrt()), len(net.calls)


@pytest.mark.parametrize(("solver", "order"), [("ode-euler", 1), ("ode-heun", 2), ("ode-ab2", 2)])
def test_order_of_convergence(solver, order):
    """Measured with 64 and 128 steps: float32 output ends the descent below 1e-7."""
    coarse, fine = error(solver, 64)[0], error(solver, 128)[0]
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def calls_for(solver, bound):
    steps = 2
    while True:
        found, calls = error(solver, steps)
        if found < bound:
            return calls
        steps = math.ceil(1.05 * steps)


@pytest.mark.parametrize("bound", [1e-2, 3e-3])
def test_ab2_reaches_the_same_error_with_fewer_network_calls(bound):
    ab2, heun, euler = (calls_for(f"ode-{name}", bound) for name in ("ab2", "heun", "euler"))
    assert ab2 < heun < euler, (ab2, heun, euler)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_table_says_the_number_of_network_calls(solver):
    for steps in (least_steps(solver), 10):
        assert error(solver, steps)[1] == network_calls(solver, steps)
    assert network_calls(solver, 10) == {"ode-heun": 19}.get(solver, 10)


@pytest.mark.parametrize("preset", PRESETS.values())
def test_the_error_of_a_preset_is_the_measured_one(preset):
    """As scripts/plot_solvers.py measures it; that of a stochastic solver is not defined."""
    if preset.error is None:
        assert SOLVERS[preset.solver].times is not ode_times
    else:
        assert f"{gaussian_error(preset.solver, preset.steps):.1e}" == f"{preset.error:.1e}"


def test_a_new_solver_is_one_function_and_one_row(monkeypatch):
    """The example in the header of utils/samplers.py."""

    def integrate_midpoint(field, x, times):
        for t, t_next in pairwise(times):
            middle = (t + t_next) / 2
            x = x + (t_next - t) * field(x + (middle - t) * field(x, t), middle)
            x = field.end_step(x, t_next)
        return x

    row = Solver("second order", integrate_midpoint, lambda steps: 2 * steps)
    monkeypatch.setitem(samplers.SOLVERS, "ode-midpoint", row)
    (coarse, calls), (fine, _) = error("ode-midpoint", 64), error("ode-midpoint", 128)
    assert math.log2(coarse / fine) > 1.75
    assert calls == network_calls("ode-midpoint", 64) == 128


@pytest.mark.parametrize("solver", SOLVERS)
def test_who_looks_on_sees_each_step_and_may_change_it(solver, sit, start):
    noise, y = start
    how, seen = {"solver": solver, "steps": 4, "generator": ImageNoise(0, range(5))}, []

    def look_on(step, t, x):
        seen.append((step, t, x))
        return x

    plain = sample(sit, noise, y, **how)
    assert torch.equal(plain, sample(sit, noise, y, **how, on_step=look_on))
    steps, times, states = zip(*seen)
    ends = [*SOLVERS[solver].times(4, 1.0)[1:], 0.0][:4]
    assert steps == (0, 1, 2, 3) and list(times) == ends and times[-1] == 0
    assert torch.equal(states[-1].float(), plain) and states[0].dtype == torch.float64
    gone = sample(sit, noise, y, **how, on_step=lambda step, t, x: x if step < 3 else x * 0)
    assert not gone.any()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_moments(solver, shift):
    """Mean and spread of N(0.7, 0.4^2) from 40,000 noises; the SDE is first order and its last
    step is one of 0.04, hence the wider bound."""
    g = torch.Generator().manual_seed(0)
    noise, y = torch.randn(40, 1, 32, 32, generator=g), torch.zeros(40).long()
    x = sample(Gaussian(), noise, y, solver=solver, steps=200, generator=g, shift=shift)
    bound = 0.02 if solver == "sde" else 0.01
    assert float(x.mean()) == pytest.approx(0.7, abs=bound)
    assert float(x.std()) == pytest.approx(0.4, abs=bound)


def test_sde_noise_is_fresh_at_every_step():
    """The result forgets where it started: correlation with the starting noise is not 1."""
    g = torch.Generator().manual_seed(0)
    noise, y = torch.randn(40, 1, 32, 32, generator=g), torch.zeros(40).long()
    x = sample(Gaussian(), noise, y, solver="sde", steps=100, generator=g)
    pair = torch.stack([noise.flatten(), x.flatten()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.5


# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_of_one_is_none(solver, sit, start):
    noise, y = start

    def draw(**guidance):
        g = torch.Generator().manual_seed(0)
        return sample(sit, noise, y, solver=solver, steps=6, generator=g, **guidance)

    plain, net = draw(), Counting(sit)
    assert torch.equal(plain, draw(cfg_scale=1.0, guidance=(0.2, 0.7)))
    assert not torch.allclose(plain, draw(cfg_scale=2.0), atol=1e-3)
    g = torch.Generator().manual_seed(0)
    sample(net, noise, y, solver=solver, steps=6, generator=g, cfg_scale=1.0)
    assert {len(call.x) for call in net.calls} == {len(noise)}


@pytest.mark.parametrize("solver", SOLVERS)
def test_outside_the_interval_only_the_conditional_branch_runs(solver, sit, start):
    noise, y = start
    net, g = Counting(sit), torch.Generator().manual_seed(0)
    sample(
        net, noise, y, solver=solver, steps=11, cfg_scale=2.0, guidance=(0.25, 0.65), generator=g
    )
    both = y.tolist() + [CLASSES] * len(y)
    for call in net.calls:
        assert call.y == (both if 0.25 <= call.t <= 0.65 else y.tolist()), call.t
    assert {len(call.y) for call in net.calls} == {len(y), 2 * len(y)}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance", [(0.0, 1.0), (0.25, 0.65), (0.3, 0.3)])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_the_rows_of_calls_are_those_the_network_gets(solver, guidance, cfg_scale, sit, start):
    """What predictions of the cost of an image count with."""
    how = {"solver": solver, "steps": 10, "cfg_scale": cfg_scale, "guidance": guidance}
    how |= {"shift": 1.5}
    net = Counting(sit)
    sample(net, *start, generator=torch.Generator(), **how)
    assert rows_of_calls(**how) == [len(call.y) // len(start[1]) for call in net.calls]


def test_the_ends_of_the_interval_belong_to_it(sit, start):
    net = Counting(sit)
    sample(net, *start, solver="ode-euler", steps=4, cfg_scale=2.0, guidance=(0.25, 0.75))
    assert [(c.t, len(c.y) // len(start[1])) for c in net.calls] == [
        (1.0, 1), (0.75, 2), (0.5, 2), (0.25, 2),
    ]  # fmt: skip


def test_heun_tests_the_interval_at_the_time_of_each_evaluation(sit, start):
    """Step 0.75 -> 0.5 with the interval [0, 0.6]: the first call is outside, the second inside."""
    net = Counting(sit)
    sample(net, *start, solver="ode-heun", steps=4, cfg_scale=2.0, guidance=(0.0, 0.6))
    assert [(c.t, len(c.y) // len(start[1])) for c in net.calls] == [
        (1.0, 1), (0.75, 1), (0.75, 1), (0.5, 2), (0.5, 2), (0.25, 2), (0.25, 2),
    ]  # fmt: skip


def test_the_null_label_is_the_number_of_classes_of_the_model(start):
    torch.manual_seed(0)
    other = SiT(8, 2, 4, hidden_size=32, depth=1, num_heads=2, num_classes=7, encoder_dims=())
    net = Counting(other)
    sample(net, *start, solver="ode-euler", steps=1, cfg_scale=2.0)
    assert net.calls[0].y[len(start[1]) :] == [7] * len(start[1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_without_a_null_label_is_refused(solver, start):
    """Such a SiT has no row for it in its label table: on CUDA, indexing it ends the process."""
    torch.manual_seed(0)
    sit = SiT(8, 2, 4, hidden_size=32, depth=1, num_heads=2, num_classes=3, encoder_dims=(),
              class_dropout_prob=0.0)  # fmt: skip
    for net in (sit, Gaussian()):
        with pytest.raises(UserError, match=r"cfg_scale 2\.0.* without a null label"):
            sample(net, *start, solver=solver, steps=3, cfg_scale=2.0)
        assert sample(net, *start, solver=solver, steps=3).isfinite().all()


class Wild(torch.nn.Module):
    """A float64 field of no structure, other for each label; an image does not depend on others."""

    null_label = CLASSES

    def forward(self, x, t, y):
        t, y = t.view(-1, 1, 1, 1), y.view(-1, 1, 1, 1)
        return torch.sin(3 * x + 5 * t + y) + x.roll(1, dims=1) * torch.cos(7 * t - y), []


def heun_with(noise, y, steps, cfg, low, high, decides, channels):
    """Heun's method as the reference implementation writes it (samplers.py of REPA-E): `decides` is
    "predictor", guided by the time at which a step begins; and as SiT and LightningDiT guide
    (`forward_with_cfg`): only the first `channels`."""
    net, null, x = Wild(), torch.full_like(y, CLASSES), noise.double()
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def velocity(x, t, guided):
        time = t.expand(len(x))
        cond, uncond = net(x, time, y)[0], net(x, time, null)[0]
        v = uncond + cfg * (cond - uncond) if guided else cond
        return torch.cat([v[:, :channels], cond[:, channels:]], dim=1)

    for i, (t, t_next) in enumerate(pairwise(times)):
        first = velocity(x, t, low <= t <= high)
        end = x + (t_next - t) * first
        if i < steps - 1:
            inside = low <= (t if decides == "predictor" else t_next) <= high
            end = x + (t_next - t) * 0.5 * (first + velocity(end, t_next, inside))
        x = end
    return x


@pytest.mark.parametrize("decides", HEUN_GUIDANCE)
@pytest.mark.parametrize("channels", [0, 1, 3, 4])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.65)])
def test_every_bit_of_guidance_as_others_write_it(decides, channels, interval, start):
    """--heun-guidance predictor and --cfg-channels 3 are the formulas of the reference
    implementations, and the defaults are what they were, in float64 to the last bit."""
    states = []
    how = {"cfg_scale": 2.5, "guidance": interval, "on_step": lambda k, t, x: states.append(x) or x}
    if decides != HEUN_GUIDANCE[0]:
        how["heun_guidance"] = decides
    if channels:
        how["cfg_channels"] = channels
    sample(Wild(), *start, solver="ode-heun", steps=9, **how)
    expected = heun_with(*start, 9, 2.5, *interval, decides, channels or 4)
    assert torch.equal(states[-1], expected)
    other = next(name for name in HEUN_GUIDANCE if name != decides)
    crossed = heun_with(*start, 9, 2.5, *interval, other, channels or 4)
    assert torch.equal(crossed, expected) is (interval == (0.0, 1.0))


@pytest.mark.parametrize("solver", SOLVERS)
def test_channels_that_are_not_guided_follow_the_conditional_branch(solver, start):
    """Where channels do not touch each other, they are those of guidance and of none."""

    def draw(**how):
        generator = ImageNoise(0, range(5))
        return sample(Jump(), *start, solver=solver, steps=7, generator=generator, **how)

    some = draw(cfg_scale=3.0, cfg_channels=3)
    assert torch.equal(some[:, :3], draw(cfg_scale=3.0)[:, :3])
    assert torch.equal(some[:, 3:], draw()[:, 3:])


class Jump(torch.nn.Module):
    """Velocity 1 with a label, 0 without."""

    null_label = CLASSES

    def forward(self, x, t, y):
        return (y != CLASSES).to(x.dtype).view(-1, 1, 1, 1).expand_as(x), []


@pytest.mark.parametrize(
    ("interval", "guided"), [((0.0, 0.65), 6), ((0.25, 1.0), 8), ((0.25, 0.65), 4)]
)
def test_ab2_starts_again_where_guidance_sets_in_and_ends(interval, guided):
    """The guided field is 3 inside the interval and 1 outside: piecewise constant, so that a solver
    which never mixes the two is exact, and one that does is not."""
    zero, y = torch.zeros(1, 4, 8, 8), torch.zeros(1).long()
    x = sample(Jump(), zero, y, solver="ode-ab2", steps=10, cfg_scale=3.0, guidance=interval)
    torch.testing.assert_close(x, torch.full_like(x, -(guided * 0.3 + (10 - guided) * 0.1)))


def test_ab2_is_the_textbook_two_step_formula_inside(sit, start):
    noise, y = start
    reference = Reference(sit, y, 1, 0, 1, "linear")
    times = [shift_time(1 - i / 5, 2.0) for i in range(6)]
    x, before = noise.double(), None
    for i in range(5):
        v, h = reference.velocity(x, times[i], y), times[i + 1] - times[i]
        if before is None:
            x = x + h * v
        else:  # the line through two velocities, integrated over the step
            w = h / (times[i] - times[i - 1])
            x = x + h * ((1 + w / 2) * v - w / 2 * before)
        before = v
    ours = sample(sit, noise, y, solver="ode-ab2", steps=5, shift=2.0)
    torch.testing.assert_close(ours.double(), x, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- numbers and times


@pytest.mark.parametrize("solver", SOLVERS)
def test_state_is_float64_and_the_network_keeps_its_precision(solver, sit, start):
    """A module without weights is handed the state itself; one with weights its own dtype."""
    bare = Counting(Gaussian())
    sample(bare, *start, solver=solver, steps=3, generator=torch.Generator().manual_seed(0))
    assert {call.dtype for call in bare.calls} == {torch.float64}
    net = Counting(sit)
    sample(net, *start, solver=solver, steps=3, generator=torch.Generator().manual_seed(0))
    assert {call.dtype for call in net.calls} == {torch.float32}


def test_a_thousand_steps_lose_nothing(start):
    """A float32 state would drift by 1e-5 here: each step rounds."""
    noise, y = start
    x = sample(Jump(), noise + 1000, y, solver="ode-euler", steps=4096)
    torch.testing.assert_close(x, noise + 999, rtol=0, atol=1e-4)


def test_times_reach_a_bfloat16_network_in_float32(start):
    torch.manual_seed(0)
    half = SiT(8, 2, 4, hidden_size=32, depth=1, num_heads=2, num_classes=3, encoder_dims=())
    seen = []
    half.bfloat16().register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    x = sample(half, *start, solver="ode-euler", steps=250)
    assert x.dtype == torch.float32
    assert {(a[0].dtype, a[1].dtype) for a in seen} == {(torch.bfloat16, torch.float32)}
    assert len({float(a[1][0]) for a in seen}) == 250


def test_a_network_left_in_gradient_mode_builds_no_graph(sit, start):
    assert not sample(sit, *start, steps=2).requires_grad


class Copies(TorchDispatchMode):
    """Counts the copies of tensors from the CPU to another device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket is torch.ops.aten._to_copy:
            self.count += args[0].device.type == "cpu" and out.device.type != "cpu"
        return out


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_times_are_copied_to_the_device_once(solver, cfg_scale, start):
    """A copy at every network call would make the CPU wait for the GPU each time."""
    noise, y = (value.to("meta") for value in start)
    net = Gaussian()
    net.null_label = CLASSES
    for steps in (5, 50):
        with Copies() as copies:
            sample(
                net, noise, y, solver=solver, steps=steps, cfg_scale=cfg_scale,
                generator=ImageNoise(0, range(5), "meta"),
            )  # fmt: skip
        assert copies.count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_waits_for_the_gpu(solver, sit, start):
    noise, y = (value.cuda() for value in start)
    how = {"solver": solver, "steps": 5, "cfg_scale": 2.0, "guidance": (0.2, 0.7)}
    net = copy.deepcopy(sit).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(net, noise, y, generator=ImageNoise(0, range(5), "cuda"), **how)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_shift_is_the_published_formula_and_one_is_the_identity():
    for t in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert shift_time(t, 1.0) == t
        assert shift_time(t, 3.0) == pytest.approx(3 * t / (1 + 2 * t))
        assert shift_time(shift_time(t, 3.0), 1 / 3) == pytest.approx(t)
        assert shift_time(t, 3.0) == t if t in (0, 1) else shift_time(t, 3.0) > t


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ends_of_the_times(shift):
    ode, sde = ode_times(10, shift), sde_times(10, shift)
    assert (len(ode), ode[0], ode[-1]) == (11, 1, 0)
    assert (len(sde), sde[0]) == (10, 1) and sde[-1] == pytest.approx(SDE_LAST_TIME)
    plain = torch.linspace(1, SDE_LAST_TIME, 10, dtype=torch.float64).tolist()
    assert (sde == plain) == (shift == 1)


def test_the_shifted_times_are_those_the_network_sees(start):
    net = Counting(Gaussian())
    sample(net, *start, solver="ode-euler", steps=4, shift=3.0)
    assert [c.t for c in net.calls] == pytest.approx([1.0, 0.9, 0.75, 0.5])


def test_an_image_does_not_depend_on_its_batch(sit, start):
    noise, y = start

    def draw(start, stop):
        own, how = ImageNoise(100, range(start, stop)), {"solver": "sde", "steps": 7}
        return sample(sit, noise[start:stop], y[start:stop], generator=own, cfg_scale=2.0, **how)

    together = draw(0, 5)
    apart = torch.cat([draw(0, 1), draw(1, 3), draw(3, 5)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("solver", "steps"), [("euler", 5), ("sde", 1), ("ode-euler", 0)])
def test_what_cannot_be_sampled_is_refused(solver, steps, sit, start):
    with pytest.raises(AssertionError):
        sample(sit, *start, solver=solver, steps=steps)
