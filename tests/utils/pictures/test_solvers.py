"""The errors of the solvers: every ODE solver is plotted, and errors fall.

python -m pytest tests/utils/pictures/test_solvers.py
"""

import sys

import pytest
import torch

from models.checks.errors import UserError
from models.sit import SiT
from models.vae import build_vae
from scripts import plot_solvers
from utils.pictures import solvers


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(solvers, "STEPS", (2, 4, 8))
    monkeypatch.setattr(solvers, "REFERENCE_STEPS", 32)


def test_every_ode_solver_has_a_curve_that_falls(few_steps):
    curves = solvers.gaussian_curves()
    assert set(curves) == {"ode-euler", "ode-heun", "ode-ab2"}
    assert [calls for calls, _ in curves["ode-heun"]] == [3, 7, 15]
    for points in curves.values():
        errors = [error for _, error in points]
        assert errors == sorted(errors, reverse=True) and 0 < errors[-1] < errors[0] / 2


@pytest.mark.slow
def test_the_script_draws_both_panels(few_steps, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    sit = SiT(4, 2, 4, hidden_size=32, depth=1, num_heads=2, num_classes=3, encoder_dims=())
    for p in sit.parameters():
        torch.nn.init.normal_(p, std=0.2)
    sit.save_pretrained(tmp_path / "0000004" / "sit_ema")
    build_vae("tiny-f2d4").save(tmp_path / "0000004" / "vae")
    words = ["--checkpoint", tmp_path / "0000004", "--out", tmp_path / "new" / "a.png"]
    words += ["--num", 2, "--cfg-scale", 2, "--guidance-high", 0.7]
    monkeypatch.setattr(sys, "argv", ["plot_solvers.py", *map(str, words)])
    plot_solvers.main()
    assert (tmp_path / "new" / "a.png").stat().st_size > 10_000
    lines = [line for line in capsys.readouterr().out.splitlines() if "ode-ab2 2:" in line]
    assert [line[:8] for line in lines] == ["Gaussian", "0000004,"]
    monkeypatch.setattr(sys, "argv", ["plot_solvers.py", "--checkpoint", str(tmp_path)])
    with pytest.raises(UserError, match="has no sit_ema/"):
        plot_solvers.main()
