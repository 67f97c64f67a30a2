"""Numbers that are not finite: what each policy leaves behind, steps left out, warnings.

python -m pytest tests/utils/training/test_nonfinite.py
"""

import copy
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file

import train_repae
from tests.tiny import TINY, batch, run_script, start, tiny_config, train_here
from utils.checkpoint import Checkpoints, find_fault
from utils.training.nonfinite import (
    SATURATED_LINES,
    LeftOutSteps,
    NonFiniteError,
    SkippedUpdates,
    Warnings,
    check_skipped,
    ema_warning,
    fitting_decay,
    require_finite,
    spatial_variance,
)
from utils.training.tracking import read_metrics

SHORT = ("run.steps=6", "run.save_every=2", "run.log_every=2", "run.keep_last=9")
LECAM = ("loss.reg.lecam=0.1", "ema.warmup=true")
NETWORKS = ("vae", "sit", "disc")
VARIANTS = {
    "joint": (),
    "accumulation": ("run.accumulation=2",),
    "bf16": ("run.precision=bf16",),
    "frozen": ("vae.train=false", "vae.name=tiny-f2d4", "vae.weights=hub"),
}


def slow(*values) -> list:
    """Parameters of a test that scripts/test.sh leaves to the slow ones."""
    return [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values
    ]


def end_of(out, step: int = 6) -> dict[str, torch.Tensor]:
    """All weights, statistics, EMA and optimizer states of a checkpoint."""
    folder = out / "tiny" / "checkpoints" / f"{step:07d}"
    assert find_fault(folder) is None
    found = {}
    for path in folder.rglob("*.safetensors"):
        found |= {f"{path.parent.name}.{path.name}.{k}": v for k, v in load_file(path).items()}
    state = torch.load(folder / "optim.pt", weights_only=True)
    for name in NETWORKS:
        for i, moments in state.get(name, {"opt": {"state": {}}})["opt"]["state"].items():
            found |= {f"{name}.{i}.{k}": v for k, v in moments.items()}
    return found | {f"lecam.{k}": v for k, v in state.get("lecam", {}).items()}


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and a
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def poison_gradient(nets, name: str, value: float = math.nan):
    """From now on a gradient of this network is not finite; returns what ends it."""
    trained = nets.trained[name]
    trained.freeze(False)
    handle = trained.params[-1].register_hook(lambda g: g * value)
    trained.freeze()
    return handle.remove


def poison_step(monkeypatch, step: int, what: str = "images", times: int = 99) -> list[int]:
    """Step number `step` of a run meets NaN, `times` times: in its images, or in the gradient of
    a network, or in a weight after the step ("weight NETWORK"). Returns the steps taken."""
    taken, honest = [], train_repae.train_step

    def train_step(nets, x, y, draws, config, number, cached=()):
        bad = number == step and taken.count(step) < times
        taken.append(number)
        undo = poison_gradient(nets, what) if bad and what in NETWORKS else None
        x = x * math.nan if bad and what == "images" else x
        metrics = honest(nets, x, y, draws, config, number, cached)
        if undo:
            undo()
        if bad and what.startswith("weight "):
            net = getattr(nets, what.split()[1])
            with torch.no_grad():
                next(iter(net.parameters())).view(-1)[0] = math.nan
        return metrics

    monkeypatch.setattr(train_repae, "train_step", train_step)
    return taken


# --------------------------------------------------------------------------------------
# stop


@pytest.mark.parametrize("what", ["images", "disc", *slow("vae", "sit")])
@pytest.mark.slow
def test_stop_names_the_term_and_the_first_bad_step(what, tmp_path, monkeypatch, capsys):
    poison_step(monkeypatch, 3, what)
    assert train_here(tmp_path, *SHORT, "run.log_every=100") == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("stopped:")]
    assert "at step 3" in line and ("loss/" in line if what == "images" else what in line)
    assert str(tmp_path / "tiny" / "checkpoints" / "0000002") in line
    assert [p.name for p in (tmp_path / "tiny" / "checkpoints").iterdir()] == ["0000002"]


@pytest.mark.parametrize("net", ["disc", *slow("vae", "sit", "ema")])
@pytest.mark.parametrize("step", [5, *slow(3)])
@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(net, step, tmp_path, monkeypatch, capsys):
    """Also those of the very last step, whose losses were finite."""
    poison_step(monkeypatch, step, f"weight {net}")
    assert train_here(tmp_path, *SHORT, "run.log_every=1") == 1
    words = {"vae": "VAE", "sit": "SiT", "disc": "discriminator", "ema": "EMA"}
    errors = capsys.readouterr().err
    assert "stopped:" in errors and words[net] in errors and f"step {step}" in errors
    names = sorted(p.name for p in (tmp_path / "tiny" / "checkpoints").iterdir())
    assert names == [f"{s:07d}" for s in range(2, step, 2)]


def test_every_tensor_of_the_state_is_looked_at(tmp_path):
    """Weights, statistics, LeCam averages, moments of each network: one NaN or infinity is found
    and named; the largest float is finite."""
    config = tiny_config(f"run.out={tmp_path}", *LECAM)
    nets, accelerator = start(config)
    train_repae.train_step(nets, *batch(config), config, 0)
    require_finite(nets.tensors(), accelerator, 1)
    names = set()
    for name, tensors in nets.tensors().items():
        for tensor in [t for t in tensors if t.is_floating_point()][:: max(1, len(tensors) // 5)]:
            kept = tensor.detach().clone()
            for value in (math.nan, -math.inf, torch.finfo(torch.float32).max):
                with torch.no_grad():
                    tensor.view(-1)[-1] = value
                if math.isfinite(value):
                    require_finite(nets.tensors(), accelerator, 1)
                else:
                    with pytest.raises(NonFiniteError, match=name) as caught:
                        require_finite(nets.tensors(), accelerator, 1)
                    assert caught.value.step == 0
            with torch.no_grad():
                tensor.copy_(kept)
        names.add(name)
    moments = {f"optimizer of {net}" for net in NETWORKS}
    assert names == {"VAE", "SiT", "EMA", "discriminator", "LeCam averages"} | moments


def test_the_default_policy_adds_nothing_to_a_step(tmp_path):
    """No guard, no flag, no counter: the optimizer runs as if there were no policy."""
    nets, _ = start(tiny_config(f"run.out={tmp_path}"))
    for trained in nets.trained.values():
        assert (trained.guard, trained.left_out, trained.skipped) == (None, None, None)


# --------------------------------------------------------------------------------------
# skip_steps


@pytest.mark.parametrize("skipped", [[0, 2, 3], *slow([3], [5])])
@pytest.mark.slow
def test_skipped_steps_are_those_of_a_loop_without_them(skipped, tmp_path, monkeypatch):
    """First, middle, last, and a whole log interval; every number of the run but the log."""
    taken = poison_step(monkeypatch, -1)
    assert train_here(tmp_path, *SHORT, *LECAM, f"run.skip_steps={skipped}") == 0
    assert taken == [step for step in range(6) if step not in skipped]
    monkeypatch.undo()
    honest = train_repae.train_step

    def train_step(nets, x, y, draws, config, number, cached=()):
        """Of a run whose loop knows nothing of skipped steps."""
        if number not in skipped:
            return honest(nets, x, y, draws, config, number, cached)
        names = ("loss/vae/pixel",)
        return {name: torch.zeros(()) for name in names}

    monkeypatch.setattr(train_repae, "train_step", train_step)
    assert train_here(tmp_path / "loop", *SHORT, *LECAM) == 0
    assert_equal(end_of(tmp_path), end_of(tmp_path / "loop"))


@pytest.mark.slow
def test_a_skipped_step_is_skipped_by_a_resumed_run_with_workers_too(tmp_path, monkeypatch):
    settings = (*SHORT, "run.skip_steps=[1,4]")
    assert train_here(tmp_path / "whole", *settings) == 0
    assert train_here(tmp_path / "parts", *settings, "run.steps=2") == 0
    taken = poison_step(monkeypatch, -1)
    assert train_here(tmp_path / "parts", *settings, "data.workers=1") == 0
    assert taken == [2, 3, 5]
    assert_equal(end_of(tmp_path / "whole"), end_of(tmp_path / "parts"))


@pytest.mark.slow
def test_a_step_that_is_trained_already_cannot_be_left_out(tmp_path, monkeypatch, capsys):
    """Unless it was not: it has been left out by the setting, or by a rollback."""
    poison_step(monkeypatch, 1)
    first = ("run.save_every=1", "run.skip_steps=[2]", "run.on_nonfinite=rollback")
    assert train_here(tmp_path, *SHORT, *first, "run.steps=4") == 0
    before = end_of(tmp_path, 4)
    assert train_here(tmp_path, *SHORT, "run.skip_steps=[1,2,3,5]") == 2
    assert "names step 3," in capsys.readouterr().err
    assert_equal(end_of(tmp_path, 4), before)
    assert train_here(tmp_path, *SHORT, "run.skip_steps=[1,2,5]") == 0


@pytest.mark.slow
def test_an_interval_without_a_step_has_no_log_line(tmp_path):
    assert train_here(tmp_path, *SHORT, "run.skip_steps=[2,3]") == 0
    rows = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 6]


# --------------------------------------------------------------------------------------
# skip


@pytest.mark.parametrize("variant", ["joint", *slow("accumulation", "bf16", "frozen")])
@pytest.mark.usefixtures("native_halves")
def test_skip_of_a_bad_batch_equals_a_run_that_leaves_it_out(variant, tmp_path, monkeypatch):
    """Bit for bit: weights, moments and their step, latent norm, batch norm, LeCam, EMA."""
    settings = (*SHORT, *LECAM, *VARIANTS[variant], "run.log_every=1")
    if variant == "frozen":
        assert train_here(tmp_path, "run.steps=2", "run.name=origin") == 0
        vae = tmp_path / "origin" / "checkpoints" / "0000002" / "vae"
        settings = (*SHORT, "vae.train=false", f"vae.name={vae}", "vae.weights=hub")
    assert train_here(tmp_path / "left out", *settings, "run.skip_steps=[3]") == 0
    poison_step(monkeypatch, 3)
    assert train_here(tmp_path / "skip", *settings, "run.on_nonfinite=skip") == 0
    assert_equal(end_of(tmp_path / "left out"), end_of(tmp_path / "skip"))
    row = next(r for r in read_metrics(tmp_path / "skip/tiny/metrics.jsonl") if r["step"] in (4, 6))
    assert row["skipped/sit"] == 1
    assert row.get("skipped/vae", 1) == row.get("skipped/disc", 1) == 1


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.slow
def test_skip_leaves_out_the_update_of_that_network_alone(name, precision, tmp_path):
    """The others move as they would have without the fault."""
    config = tiny_config(f"run.out={tmp_path}", *LECAM, "run.on_nonfinite=skip")
    config.run.precision = precision
    results = {}
    for bad in (False, True):
        nets, _ = start(config)
        nets.precision = "fp32"
        before = {n: copy.deepcopy(getattr(nets, n).state_dict()) for n in (*NETWORKS, "ema")}
        before["lecam"] = copy.deepcopy(nets.lecam.state_dict())
        if bad:
            poison_gradient(nets, name)
        train_repae.train_step(nets, *batch(config), config, 0)
        results[bad] = {n: getattr(nets, n).state_dict() for n in (*NETWORKS, "ema", "lecam")}
    still = {"vae": ["vae"], "sit": ["sit", "ema"], "disc": ["disc", "lecam"]}[name]
    for net, state in results[True].items():
        expected = before[net] if net in still else results[False][net]
        assert_equal(state, expected)
    skipped = {n: int(t.skipped.counts[0]) for n, t in nets.trained.items()}
    assert skipped == {n: int(n == name) for n in NETWORKS}


def test_an_infinite_loss_with_a_finite_gradient_is_skipped(tmp_path):
    """|x_hat - x| of an infinite x_hat has gradient 1."""
    config = tiny_config(f"run.out={tmp_path}", "run.on_nonfinite=skip")
    nets, _ = start(config)
    trained = nets.trained["disc"]
    before = copy.deepcopy(nets.disc.state_dict())
    with train_repae.only_training(trained):
        weight = trained.params[0]
        trained.backward(weight.sum() + torch.tensor(math.inf))
        trained.step(0)
    assert trained.left_out
    assert_equal(nets.disc.state_dict(), before)


@pytest.mark.slow
def test_more_skips_than_allowed_end_the_run_by_name(tmp_path, monkeypatch, capsys):
    honest = train_repae.train_step

    def train_step(nets, x, y, draws, config, number, cached=()):
        undo = poison_gradient(nets, "disc") if number in (1, 3, 4) else lambda: None
        metrics = honest(nets, x, y, draws, config, number, cached)
        undo()
        return metrics

    monkeypatch.setattr(train_repae, "train_step", train_step)
    assert train_here(tmp_path / "3", *SHORT, "run.on_nonfinite=skip", "run.max_nonfinite=3") == 0
    # two parts: what was skipped before the resume counts
    settings = (*SHORT, "run.on_nonfinite=skip", "run.max_nonfinite=2")
    assert train_here(tmp_path / "2", *settings, "run.steps=4") == 0
    assert train_here(tmp_path / "2", *settings) == 1
    errors = capsys.readouterr().err
    assert "disc" in errors and "run.max_nonfinite=2" in errors
    assert Checkpoints(tmp_path / "2" / "tiny").latest().name == "0000004"


def test_skips_are_counted_in_all_and_in_a_row():
    """Under fp16 only those in a row count: the loss scale skips some in normal operation."""
    skipped = SkippedUpdates(torch.device("cpu"))
    for bad in (1, 1, 0, 1, 1, 1, 0, 1):
        skipped.add(torch.tensor(bool(bad)))
    assert skipped.counts.tolist() == [6, 1, 3]
    again = SkippedUpdates(torch.device("cpu"))
    again.load_state_dict(skipped.state_dict())
    assert check_skipped({"vae": again}, 6, fp16=False) == {"skipped/vae": 6}
    assert check_skipped({"vae": again}, 3, fp16=True) == {"skipped/vae": 6}
    for limit, fp16 in ((5, False), (2, True)):
        with pytest.raises(NonFiniteError, match=f"vae.*run.max_nonfinite={limit}") as caught:
            check_skipped({"vae": again}, limit, fp16)
        assert caught.value.step is None  # no step to leave out


@pytest.mark.slow
def test_fp16_that_skips_every_update_ends_by_name(tmp_path, monkeypatch, capsys):
    honest = train_repae.train_step

    def train_step(nets, *args):
        nets.precision = "fp16"
        undo = poison_gradient(nets, "sit", math.inf)
        metrics = honest(nets, *args)
        undo()
        return metrics

    monkeypatch.setattr(train_repae, "train_step", train_step)
    settings = ("run.precision=fp16", "run.max_nonfinite=3", "run.steps=6", "run.save_every=100")
    assert train_here(tmp_path, *settings) == 1
    errors = capsys.readouterr().err
    assert "sit" in errors and "in a row" in errors and "run.max_nonfinite=3" in errors


# --------------------------------------------------------------------------------------
# rollback

ROLLBACK = ("run.on_nonfinite=rollback",)


@pytest.mark.parametrize(
    ("step", "what"), [(3, "sit"), *slow((2, "images"), (5, "disc"), (4, "vae"))]
)
@pytest.mark.slow
def test_rollback_ends_as_a_run_that_skips_the_step(step, what, tmp_path, monkeypatch, capsys):
    """Bit for bit, and log line for log line; a run that resumes leaves the step out too."""
    settings = (*SHORT, *LECAM, "run.log_every=1")
    assert train_here(tmp_path / "skip", *settings, f"run.skip_steps=[{step}]") == 0
    taken = poison_step(monkeypatch, step, what)
    assert train_here(tmp_path / "back", *settings, *ROLLBACK) == 0
    assert taken.count(step) == 1 and taken[-1] == (4 if step == 5 else 5)
    assert_equal(end_of(tmp_path / "skip"), end_of(tmp_path / "back"))
    rows = [read_metrics(tmp_path / name / "tiny/metrics.jsonl") for name in ("skip", "back")]
    for mine, theirs in zip(*rows, strict=True):
        same = set(mine) - {"images_per_second", "seconds_waiting_for_data"}
        assert {k: mine[k] for k in same} == {k: theirs[k] for k in same}
    (record,) = json.loads((tmp_path / "back/tiny/left_out_steps.json").read_text())["steps"]
    assert record["step"] == step and "not finite" in record["reason"]
    assert f"step {step}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_rollback_is_remembered_by_the_run_folder(tmp_path, monkeypatch):
    taken = poison_step(monkeypatch, 3)
    assert train_here(tmp_path, *SHORT, *ROLLBACK, "run.steps=4") == 0
    for folder in (tmp_path / "tiny" / "checkpoints").glob("0000004"):
        (folder / "state.json").unlink()  # as if killed while it saved
    taken.clear()
    assert train_here(tmp_path, *SHORT, "run.on_nonfinite=stop") == 0
    assert taken == [2, 4, 5]


@pytest.mark.slow
def test_weights_that_went_bad_roll_back_too(tmp_path, monkeypatch):
    poison_step(monkeypatch, 3, "weight disc", times=1)
    assert train_here(tmp_path, *SHORT, *ROLLBACK) == 0
    record = json.loads((tmp_path / "tiny" / "left_out_steps.json").read_text())
    assert [bad["step"] for bad in record["steps"]] == [3]


@pytest.mark.slow
def test_rollbacks_end(tmp_path, monkeypatch, capsys):
    """At their limit, and where there is no checkpoint yet."""
    honest = train_repae.train_step

    def train_step(nets, x, *rest):
        return honest(nets, x * math.nan if rest[-2] >= 3 else x, *rest)

    monkeypatch.setattr(train_repae, "train_step", train_step)
    assert train_here(tmp_path, *SHORT, *ROLLBACK, "run.max_nonfinite=2") == 1
    assert "run.max_nonfinite=2" in capsys.readouterr().err
    record = json.loads((tmp_path / "tiny" / "left_out_steps.json").read_text())
    assert [bad["step"] for bad in record["steps"]] == [3, 4]
    assert train_here(tmp_path / "none", *SHORT, *ROLLBACK, "run.save_every=5") == 1
    assert "no checkpoint to go back to" in capsys.readouterr().err
    assert not (tmp_path / "none" / "tiny" / "left_out_steps.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "rollback", "stop"])
def test_nan_on_one_rank_of_two_is_met_by_both_alike(policy, tmp_path):
    """Both leave out that step, or both end: exit code 1, the last good checkpoint stays."""
    program = ("tests/nonfinite_ranks.py", 1, 3)
    settings = (*TINY, *SHORT, *LECAM, f"run.on_nonfinite={policy}", f"run.out={tmp_path}")
    done = run_script(*program, *settings, ranks=2)
    if policy == "stop":
        assert done.returncode != 0 and "is not finite at step 3" in done.stderr
        assert done.stderr.count("stopped:") == 1
        assert Checkpoints(tmp_path / "tiny").latest().name == "0000002"
        return
    assert done.returncode == 0, done.stderr[-2000:]
    left_out = ("run.skip_steps=[3]", f"run.out={tmp_path / 'left out'}")
    other = run_script("train_repae.py", *TINY, *SHORT, *LECAM, *left_out, ranks=2)
    assert other.returncode == 0, other.stderr[-2000:]
    assert_equal(end_of(tmp_path), end_of(tmp_path / "left out"))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"steps": [{"step": -1}]}', '{"steps": [{"step": "3"}]}', "\x00"]
)
def test_a_damaged_record_is_one_line(text, tmp_path, capsys):
    path = tmp_path / "tiny" / "left_out_steps.json"
    path.parent.mkdir()
    path.write_text(text)
    assert train_here(tmp_path) == 2
    assert str(path) in capsys.readouterr().err


def test_left_out_steps_pair_steps_with_batches(tmp_path):
    left_out = LeftOutSteps(tiny_config(f"run.out={tmp_path}", "run.skip_steps=[2,5]"))
    pairs = list(left_out.batches(iter("abc"), 1, 6))
    assert pairs == [(1, "a"), (2, None), (3, "b"), (4, "c"), (5, None)]


# --------------------------------------------------------------------------------------
# Warnings


def looked(warnings: Warnings, rows: list[dict]) -> list[dict]:
    words = []
    found = [warnings.look_at(row, words.append) for row in rows]
    assert len(words) == sum(len([k for k in row if "ema" not in k]) for row in found)
    return found


WARM = ("ema.warmup=true",)


@pytest.mark.parametrize(("hinge", "warns"), [(1.0, True), (0.0, True), (0.995, True), (0.9, False),
                                              (0.5, False), (math.nan, False)])  # fmt: skip
def test_a_saturated_discriminator_is_warned_of_once(hinge, warns):
    rows = [{"loss/disc/hinge": hinge}] * (SATURATED_LINES - 1)
    warnings = Warnings(tiny_config(*WARM))
    assert looked(warnings, rows) == [{}] * len(rows)
    again = Warnings(tiny_config(*WARM))  # a run that is resumed here
    again.load_state_dict(json.loads(json.dumps(warnings.state_dict())))
    first, *later = looked(again, rows)
    assert list(first) == ["warning/discriminator_hinge"] * warns
    assert later == [{}] * len(later)


def test_a_discriminator_that_recovers_in_between_is_not_warned_of():
    rows = [{"loss/disc/hinge": 0.5 if i % 5 == 0 else 0.0} for i in range(50)]
    assert looked(Warnings(tiny_config(*WARM)), rows) == [{}] * 50


def test_collapsing_latents_are_warned_of_once_relative_to_the_start():
    rows = [{"vae/latent_variance": v} for v in (math.nan, 2.0, 0.3, 0.21, 0.19, 0.1, 3.0, 0.1)]
    warnings = Warnings(tiny_config(*WARM))
    found = looked(warnings, rows[:3])
    again = Warnings(tiny_config(*WARM))
    again.load_state_dict(warnings.state_dict())
    found += looked(again, rows[3:])
    assert [list(f) for f in found] == [[], [], [], [], ["warning/latent_variance"], [], [], []]
    assert found[4]["warning/latent_variance"] == pytest.approx(0.095)


def test_the_spatial_variance_of_latents():
    z = torch.randn(4, 3, 8, 8) * 2 + torch.arange(3)[:, None, None] * 100.0
    expected = ((z - z.mean(dim=(-2, -1), keepdim=True)) ** 2).mean()
    assert spatial_variance(z).item() == pytest.approx(expected.item(), rel=1e-5)
    assert spatial_variance(torch.full((2, 3, 4, 4), 7.0)) == 0


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        (("ema.decay=0.9999", "run.steps=29955"), True),
        (("ema.decay=0.9999", "run.steps=29956"), False),
        (("ema.decay=0.9999", "run.steps=29956", "disc.pretrain_steps=1"), True),
        (("ema.decay=0.9999", "run.steps=4", "ema.warmup=true"), False),
        (("ema.decay=0", "run.steps=1"), False),
    ],
)
def test_an_ema_that_reaches_further_than_the_run(settings, warns):
    assert (ema_warning(tiny_config(*settings)) is not None) == warns


@pytest.mark.parametrize("steps", [1, 4, 79, 300, 2000, 20_000, 200_000])
def test_the_decay_that_is_advised_fits_the_run(steps):
    _, words = ema_warning(tiny_config("ema.decay=0.99999", f"run.steps={steps}"))
    (advice,) = re.findall(r"set (ema\.decay=[\d.]+),", words)
    fits = ema_warning(tiny_config(advice, f"run.steps={steps}"))
    assert fits is None or steps < 5  # no average of so few steps forgets the start
    assert fitting_decay(400_000) == 0.9999  # the published pair


def test_what_an_ema_keeps_of_a_run_that_begins_with_trained_weights(tmp_path):
    config = tiny_config("run.steps=100", "ema.decay=0.999")
    config.run.init_from = str(tmp_path)
    assert f"90% of what is sampled would be left of {tmp_path}" in ema_warning(config)[1]


@pytest.mark.slow
def test_warnings_are_printed_once_and_survive_a_resume(tmp_path, monkeypatch, capsys):
    """Constant latents from step 2 on: a warning in the log and in the line of that step, none
    after a resume; the EMA's is known at the start."""
    monkeypatch.setattr(
        train_repae, "spatial_variance", lambda z: torch.tensor(1.0 if calls(z) <= 2 else 1e-3)
    )
    seen = []

    def calls(z):
        seen.append(z)
        return len(seen)

    assert train_here(tmp_path, *SHORT, "run.steps=4") == 0
    errors = capsys.readouterr().err
    assert errors.count("warning: the latents collapse") == errors.count("warning: ema.decay") == 1
    assert train_here(tmp_path, *SHORT) == 0
    assert "warning:" not in capsys.readouterr().err
    rows = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    found = [{k for k in row if k.startswith("warning/")} for row in rows]
    assert found == [{"warning/ema_reach"}, {"warning/latent_variance"}, set()]
