"""The batch of a published run.

python -m pytest tests/utils/doctor/test_shapes.py
"""


def test_a_published_run_with_another_batch_is_warned_about(quick):
    status, text = quick("run.batch_size=64", published=True).only("batch")
    assert status == "warn" and "run.batch_size=256" in text
    assert quick("run.batch_size=64").only("batch")[0] == "ok"
