"""Processes and devices: what the main process does for all, and where a rank computes."""

import pytest
import torch
from accelerate.state import AcceleratorState

from models.checks.errors import UserError
from utils import distributed
from utils.distributed import Ranks, default_device


def test_the_result_and_the_error_of_the_main_process_reach_the_caller():
    ranks = Ranks(distributed=False)
    assert ranks.on_main(lambda: 7) == 7 and ranks.main_first(lambda: 8) == 8
    for call in (ranks.on_main, ranks.main_first):
        with pytest.raises(UserError, match="no such file"):
            call(fail)


def fail():
    raise UserError("no such file")


class OtherRank(Ranks):
    """Rank 1 of two, for which `broadcast` stands in."""

    def __init__(self):
        super().__init__(distributed=False)
        self.rank, self.world = 1, 2


def test_the_other_ranks_get_the_value_or_end_in_silence(monkeypatch):
    """Exit code 0: a launcher kills everything at the first other code, also the rank that is
    about to print the message."""
    rank = OtherRank()
    monkeypatch.setattr("utils.distributed.broadcast_object_list", lambda _: [False, 7])
    assert rank.on_main(fail) == 7
    assert rank.main_first(lambda: 9) == 9
    monkeypatch.setattr("utils.distributed.broadcast_object_list", lambda _: [True, None])
    with pytest.raises(SystemExit) as end:
        rank.on_main(lambda: 1)
    assert end.value.code == 0


def test_an_apple_gpu_is_not_used_and_that_is_said_once(monkeypatch, capsys, tmp_path, accelerator):
    """mps has no float64, in which statistics, metrics and the sampler's state are kept: the
    quickstart would crash at the first of them. The fixture restores accelerate's state."""
    del accelerator
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *a, **k: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    distributed._say_that_mps_is_left_out.cache_clear()
    assert default_device().type == Ranks(distributed=False).device.type == "cpu"
    assert distributed.start(tmp_path, [], tf32=False).device.type == "cpu"
    assert Ranks().device.type == "cpu"
    assert capsys.readouterr().err.count("this runs on the CPU") == 1


def test_run_bucket_mb_is_the_size_of_the_buckets_of_gradients(tmp_path, accelerator):
    """`run.bucket_mb`; the fixture restores accelerate's state."""
    del accelerator
    made = distributed.start(tmp_path, [], tf32=False, bucket_mb=100)
    assert made.ddp_handler.bucket_cap_mb == 100
