"""Metrics: means over steps, the first bad step and its term, and the lines a resumed run keeps."""

import json
import math
import time

import pytest
import torch

from utils.training.tracking import NonFiniteError, Tolerance, Tracker, read_metrics


@pytest.fixture
def tracker(accelerator, tmp_path):
    return Tracker(accelerator, tmp_path, batch_size=32)


def scalars(**values):
    return {name.replace("_", "/"): torch.tensor(value) for name, value in values.items()}


def test_flush_gives_the_mean_of_each_term_since_the_last_one(tracker):
    for step, value in enumerate([1.0, 2.0, 6.0]):
        tracker.add(scalars(loss_a=value, loss_b=-value / 2), step)
    row = tracker.flush(3)
    assert row["loss/a"] == 3.0 and row["loss/b"] == -1.5
    tracker.add(scalars(loss_a=10.0, loss_b=0.0), 3)
    assert tracker.flush(4)["loss/a"] == 10.0  # nothing of before is left


def test_means_are_taken_in_float64(tracker):
    """A hundred losses of 16777216 and one of 1: float32 sums would drop the one."""
    for step in range(100):
        tracker.add(scalars(loss_a=16777216.0), step)
    tracker.add(scalars(loss_a=1.0), 100)
    assert tracker.flush(101)["loss/a"] == (100 * 16777216 + 1) / 101


def test_any_scalar_shape_and_type_may_be_added_and_keeps_no_graph(tracker):
    loss = torch.tensor([[2.0]], dtype=torch.bfloat16, requires_grad=True)
    tracker.add({"loss/a": loss * 2, "count": torch.tensor(3)}, 0)
    assert not tracker.sums.requires_grad
    row = tracker.flush(1)
    assert row["loss/a"] == 4.0 and row["count"] == 3.0


def test_jsonl_holds_one_line_a_flush_with_step_terms_and_speed(tracker, monkeypatch):
    clock = iter([100.0, 104.0, 104.0])
    tracker.since = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    next(clock)
    for step in range(5):
        tracker.add(scalars(loss_a=1.5), step)
    returned = tracker.flush(5)
    lines = tracker.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 5} | returned]
    speed = {"images_per_second": 5 * 32 / 4.0, "seconds_waiting_for_data": 0.0}
    assert returned == {"loss/a": 1.5} | speed
    assert read_metrics(tracker.path) == [{"step": 5, "loss/a": 1.5} | speed]


def test_the_wait_for_data_is_counted_and_nothing_else(tracker, monkeypatch):
    """Two batches that take 3 s each to come, 10 s of work after each: 3 s a step."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def loader():
        for number in range(2):
            clock[0] += 3
            yield number

    seen = []
    for number in tracker.timed(loader()):
        seen.append(number)
        clock[0] += 10
        tracker.add(scalars(loss_a=1.0), number)
    assert seen == [0, 1]
    assert tracker.flush(2)["seconds_waiting_for_data"] == 3.0


def test_every_line_has_the_status_of_the_moment(accelerator, tmp_path):
    """The learning rate, say; also in a line that is written because the terms have changed."""
    rate = iter([0.1, 0.2])
    tracker = Tracker(accelerator, tmp_path, 1, status=lambda: {"lr/sit": next(rate)})
    tracker.add(scalars(loss_a=1.0), 0)
    tracker.add(scalars(loss_b=1.0), 1)
    tracker.flush(2)
    assert [row["lr/sit"] for row in read_metrics(tracker.path)] == [0.1, 0.2]


def test_flush_without_steps_writes_nothing(tracker):
    assert tracker.flush(7) == {}
    assert not tracker.path.exists()


def test_terms_that_appear_later_start_a_new_line(tracker):
    """The generator term begins at loss.reg.gan_start: no mean mixes steps with and without it."""
    tracker.add(scalars(loss_a=1.0), 0)
    tracker.add(scalars(loss_a=3.0), 1)
    tracker.add(scalars(loss_a=5.0, loss_gan=7.0), 2)
    tracker.flush(3)
    first, second = read_metrics(tracker.path)
    assert first["step"] == 2 and first["loss/a"] == 2.0 and "loss/gan" not in first
    assert second["step"] == 3 and second["loss/a"] == 5.0 and second["loss/gan"] == 7.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_its_term_and_first_step(tracker, bad):
    values = [(1.0, 1.0), (1.0, bad), (bad, 1.0), (1.0, bad)]
    for step, (a, b) in enumerate(values, start=40):
        tracker.add(scalars(loss_a=a, loss_b=b), step)
    with pytest.raises(NonFiniteError, match=r"^loss/b is not finite at step 41$"):
        tracker.flush(44)
    assert not tracker.path.exists()  # no line with a NaN in it


def test_a_gradient_norm_stops_a_run_unless_a_loss_scale_skips_such_steps(tracker):
    """And where it does not, the line stays JSON: null, for there is no infinity in it."""
    metrics = {"loss/a": torch.tensor(1.0), "grad_norm/sit": torch.tensor(math.inf)}
    tracker.add(metrics, 0)
    with pytest.raises(NonFiniteError, match="grad_norm/sit is not finite at step 0"):
        tracker.flush(1)
    fp16 = Tracker(tracker.accelerator, tracker.path.parent, 1, guarded=("loss/",))
    fp16.add(metrics, 1)
    assert fp16.flush(2)["loss/a"] == 1.0
    assert json.loads(fp16.path.read_text())["grad_norm/sit"] is None


def test_rewind_drops_lines_of_later_steps_and_torn_ones(tracker):
    for step in (10, 20, 30):
        tracker.add(scalars(loss_a=float(step)), step - 1)
        tracker.flush(step)
    with tracker.path.open("a") as file:
        file.write('{"step": 15, "loss/a": 1.2, "im')  # killed while writing
    tracker.rewind(20)
    assert [row["step"] for row in read_metrics(tracker.path)] == [10, 20]
    tracker.add(scalars(loss_a=5.0), 20)
    tracker.flush(30)
    lines = [json.loads(line) for line in tracker.path.read_text().splitlines()]
    assert [(row["step"], row["loss/a"]) for row in lines] == [(10, 10.0), (20, 20.0), (30, 5.0)]


def test_rewind_mends_a_line_that_lost_only_its_end(tracker):
    """Else the next line would be glued to it, and both be lost."""
    tracker.path.write_text('{"step": 10, "loss/a": 1.0}')
    tracker.rewind(10)
    tracker.add(scalars(loss_a=2.0), 10)
    tracker.flush(20)
    assert [row["step"] for row in read_metrics(tracker.path)] == [10, 20]


def test_rewind_to_the_start_or_without_a_file(tracker):
    tracker.rewind(5)
    assert not tracker.path.exists()
    tracker.path.write_text('{"step": 10}\n')
    tracker.rewind(0)
    assert tracker.path.read_text() == ""


def test_rewind_leaves_a_file_without_later_lines_alone(tracker):
    text = '{"step": 10, "loss/a":   1.0}\n'
    tracker.path.write_text(text)
    tracker.rewind(10)
    assert tracker.path.read_text() == text


def test_read_metrics_passes_over_what_is_no_whole_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n[1, 2]\n\n{"loss/a": 3}\n{"step": 2}\n{"step"')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_line_that_cannot_be_written_is_said_once_and_the_next_ones_come(tracker, capsys):
    folder = tracker.path.parent
    tracker.path = folder / "gone" / "metrics.jsonl"
    for step in (1, 2):
        tracker.write(step, {"loss/a": 1.0})
    assert capsys.readouterr().err.count("not written (No such file or directory") == 1
    tracker.path.parent.mkdir()
    tracker.write(3, {"loss/a": 1.0})
    assert [row["step"] for row in read_metrics(tracker.path)] == [3]


@pytest.mark.parametrize(("error", "why"), [("two\n lines", "two lines"), ("", "ValueError")])
def test_a_failure_is_told_in_one_line_whatever_the_error_says(error, why, capsys):
    with Tolerance().of("curves", Exception):
        raise ValueError(error)
    expected = f"warning: curves not written ({why}); the run does without\n"
    assert capsys.readouterr().err == expected


def test_a_line_follows_one_that_a_full_disk_has_cut(tracker):
    tracker.path.write_text('{"step": 1}\n{"ste')
    tracker.write(3, {"loss/a": 1.0})
    assert [row["step"] for row in read_metrics(tracker.path)] == [1, 3]


def test_a_line_whose_steps_were_trained_by_two_processes_is_the_same(accelerator, tmp_path):
    """Sums go through a file between two log lines; not a bit is lost."""
    values, trackers = torch.rand(6, dtype=torch.float64), []
    for name in ("whole", "first", "second"):
        (tmp_path / name).mkdir()
        trackers.append(Tracker(accelerator, tmp_path / name, batch_size=1))
    whole, first, second = trackers
    assert not whole.state_dict()
    for step, value in enumerate(values.tolist()):
        whole.add(scalars(loss_a=value), step)
        if step == 4:
            torch.save(first.state_dict(), tmp_path / "state.pt")
            second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        (first if step < 4 else second).add(scalars(loss_a=value), step)
    assert whole.flush(6)["loss/a"] == second.flush(6)["loss/a"]


def test_a_bad_loss_is_not_forgotten_by_a_stop(accelerator, tmp_path):
    first, second = (Tracker(accelerator, tmp_path, batch_size=1) for _ in range(2))
    first.add(scalars(loss_a=math.nan), 7)
    second.load_state_dict(first.state_dict())
    with pytest.raises(NonFiniteError, match="loss/a is not finite at step 7"):
        second.flush(8)


class ThreeRanks:
    """What `Tracker` needs of accelerate, as rank 0 of three: `gather` adds the others' tensors. It
    is its own tracker of curves."""

    is_main_process, name = True, "curves"

    def __init__(self, *others):
        self.others, self.trackers = others, [self]

    def gather(self, tensor):
        return torch.cat([tensor, *self.others])

    def log(self, row, step):
        self.logged = (row, step)


def packed(sums, bad=math.inf):
    """(1, 2, terms) of another rank: means, first bad steps."""
    return torch.tensor([[[sums], [bad]]], dtype=torch.float64)


def test_means_span_ranks(tmp_path):
    ranks = ThreeRanks(packed(2.0), packed(6.0))
    tracker = Tracker(ranks, tmp_path, batch_size=1)
    tracker.add(scalars(loss_a=1.0), 0)
    row = tracker.flush(1)
    assert row["loss/a"] == 3.0
    assert ranks.logged == (row, 1)


def test_a_bad_loss_of_another_rank_stops_this_one(tmp_path):
    tracker = Tracker(ThreeRanks(packed(math.nan, 8), packed(1.0)), tmp_path, batch_size=1)
    tracker.add(scalars(loss_a=1.0), 9)
    with pytest.raises(NonFiniteError, match="loss/a is not finite at step 8"):
        tracker.flush(10)


def test_only_the_main_process_writes(tmp_path):
    ranks = ThreeRanks()
    ranks.is_main_process = False
    tracker = Tracker(ranks, tmp_path, batch_size=1)
    tracker.add(scalars(loss_a=1.0), 0)
    assert tracker.flush(1)["loss/a"] == 1.0
    assert not tracker.path.exists() and not hasattr(ranks, "logged")
    tracker.path.write_text('{"step": 10}\n')
    tracker.rewind(0)
    assert tracker.path.read_text() == '{"step": 10}\n'
