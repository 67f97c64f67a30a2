"""The machine: package versions, loader workers against cores and shared memory.

python -m pytest tests/utils/doctor/test_machine.py
"""

import torch

from utils.doctor import machine


def test_workers_need_cores_and_shared_memory(quick, monkeypatch):
    monkeypatch.setattr(machine, "cpu_cores", lambda: 4)
    status, text = quick("data.workers=3", ranks=2).only("workers")
    assert status == "warn" and "set data.workers=2" in text
    batch = 4 * 4 * 3 * 16 * 16  # batches ahead x images of a rank x their bytes
    monkeypatch.setattr(machine, "free_shared_memory", lambda: 2 * 2 * batch)
    status, text = quick("data.workers=3", ranks=2).only("workers")
    assert status == "FAIL" and "data.workers=2" in text and "--shm-size" in text
    assert not quick("data.workers=2", ranks=2).failed


def test_packages_are_compared_with_the_requirements(quick, monkeypatch, tmp_path):
    assert machine.outdated_packages() == []
    file = tmp_path / "requirements.txt"
    file.write_text("torch>=99.1  # too new\nnumpy>=1\nno-such-package>=2\n\n# a comment\n")
    monkeypatch.setattr(machine, "REQUIREMENTS", file)
    here = torch.__version__.split("+")[0]
    expected = [f"torch>=99.1 (here: {here})", "no-such-package>=2 (here: none)"]
    assert machine.outdated_packages() == expected
    (status, text), _ = quick()["packages"]
    assert status == "warn" and "pip install" in text
