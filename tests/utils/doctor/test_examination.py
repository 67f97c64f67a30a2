"""The examination as a whole: every check speaks, and no failure stops the others.

python -m pytest tests/utils/doctor
"""

from models.checks.errors import UserError
from utils.cost.fake_cuda import too_old
from utils.doctor.findings import check, fail, ok

CHECKS = ["packages", "data", "images", "batch", "ema", "resume", "tokens", "device", "workers"]
CHECKS += ["vae", "encoder", "disc", "disk", "memory", *([] if too_old() else ["time"])]
PASSED = {"packages", "ema", "device", "workers"}


def test_a_sound_run_has_a_line_a_check_and_nothing_is_written(examined, tmp_path):
    found = examined("ema.warmup=true")
    assert list(found) == CHECKS
    assert {status for lines in found.values() for status, _ in lines} == {"ok"}
    assert "1,797 images of 10 classes" in found.only("data")[1]
    assert "8 = 8 x 1 rank(s) x 1 micro-batch(es)" in found.only("batch")[1]
    assert "4x4 tokens of 4x8x8 latents" in found.only("tokens")[1]
    assert not list(tmp_path.iterdir())


def test_every_mistake_is_named_and_none_stops_the_others(examined):
    found = examined(
        *("data.source=folder", "data.path=/nowhere", "run.batch_size=9"),
        *("encoder.grid=2", "encoder.weights=[x.pth]", "vae.weights=y", "disc.weights=z.pt"),
        *("loss.reg.lpips=1", "loss.reg.lpips_weights=v", "eval.every=2", "run.resume=/none"),
        ranks=2,
    )
    failed = {name: text for name, ((status, text),) in found.items() if status == "FAIL"}
    not_reached = {"images", "disk", "memory", "time"}
    assert failed.keys() == {*CHECKS, "lpips", "eval"} - PASSED - not_reached
    assert "no such folder" in failed["data"] and "a multiple of 2" in failed["batch"]
    assert "set encoder.grid=4" in failed["tokens"] and "vae.weights=y" in failed["vae"]
    assert "loss.reg.lpips=0" in failed["lpips"] and "disc.weights=z.pt" in failed["disc"]
    assert "eval.every=0" in failed["eval"] and "run.resume=/none" in failed["resume"]


def test_a_check_names_its_findings_and_hands_on_what_it_found():
    @check("sound")
    def sound():
        yield ok("a")
        yield ok("b", "another")
        return 7

    @check("broken")
    def broken():
        yield ok("a")
        raise UserError("b")

    def both():
        values.append((yield from sound()))
        values.append((yield from broken()))

    values = []
    expected = [ok("a", "sound"), ok("b", "another"), ok("a", "broken"), fail("b", "broken")]
    assert list(both()) == expected and values == [7, None]
