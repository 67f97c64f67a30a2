"""torch.compile over ten real steps: whole graphs, made once, and the losses of an eager run.

python -m pytest tests/test_compile.py
"""

import json

import pytest

from tests.compiled_steps import STEPS
from tests.tiny import run_script

pytestmark = pytest.mark.slow


def reports(out, ranks: int, *overrides: str) -> list[dict]:
    done = run_script("tests/compiled_steps.py", out, *overrides, ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("ranks", "accumulation", "checkpointing"), [(1, 1, "none"), (1, 2, "both"), (2, 2, "both")]
)
def test_ten_steps_have_whole_graphs_that_are_made_once(
    tmp_path, ranks, accumulation, checkpointing
):
    settings = f"run.accumulation={accumulation}", f"run.checkpointing={checkpointing}"
    for report in reports(tmp_path, ranks, *settings):
        # of the encoder and the VAE, and of the discriminator and the SiT where they train and not
        check(report, graphs=6)


def test_warm_ups_lpips_and_previews_add_their_graphs_once(tmp_path):
    """Nor does a preview, whose batches have other sizes, change those of the training step: it has
    two sizes of the EMA and of its decoder, and reconstructions one of encoder and decoder."""
    settings = "disc.pretrain_steps=1 loss.reg.gan_start=2 loss.reg.lpips=1 "
    settings += "loss.reg.lpips_weights=random preview.every=1 preview.num=19"
    (report,) = reports(tmp_path, 1, *settings.split())
    # those above; the VAE without gradients, LPIPS; EMA and decoder twice, encoder and decoder
    # in the fifth step LPIPS of random weights begins to multiply what rounding made different
    check(report, graphs=6 + 2 + 4 + 2, equal=4)


def check(report: dict, graphs: int, equal: int = STEPS) -> None:
    """No graph is broken, made after it was first needed, or made again (`error_on_recompile`); and
    the metrics of the first `equal` steps are those of the eager run, to rounding."""
    first, last = report["counts"]
    assert first == last
    assert (first["graphs"], first["breaks"]) == (graphs, 0)
    assert len(report["compiled"]) == len(report["eager"]) == STEPS
    for compiled, eager in zip(report["compiled"][:equal], report["eager"]):
        assert compiled == pytest.approx(eager, rel=1e-4, abs=1e-6)
