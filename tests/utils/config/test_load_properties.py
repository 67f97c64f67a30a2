"""Properties of configs for any overrides: they survive YAML, later ones win, their order among
different settings does not matter, and what is none is refused in one line."""

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from models.checks.errors import UserError
from utils.config.load import load_config, read_saved_config, to_yaml

# texts that YAML 1.1 would read as something else, and others that need quotes
WORDS = ("0400", "1.10", "yes", "off", "2026-01-01", "12:30:00", "1e3", "null-like", "a: b",
         "# x", "gr\u00fcn", "'q'", '"', "[1]", "{a}", "~x", "-", "0x10", "1_000")  # fmt: skip
NAMES = st.sampled_from([word for word in WORDS if word.replace(".", "").isalnum()])
VALUES = {
    "run.name": NAMES,
    "data.path": st.sampled_from(WORDS).map(lambda word: f"/data/{word}"),
    "run.steps": st.integers(1, 10**9),
    "run.seed": st.integers(0, 2**31),
    "run.channels_last": st.sampled_from(["true", "false"]),
    "sit.optim.lr": st.floats(1e-8, 1e-2).map(repr),
    "vae.optim.beta1": st.floats(0, 0.99).map(repr),
    "data.workers": st.integers(0, 64),
    "loss.reg.kl": st.floats(0, 1).map(repr),
}
OVERRIDES = st.fixed_dictionaries({}, optional=VALUES)


def words(values: dict) -> list[str]:
    return [f"{name}={value}" for name, value in values.items()]


@given(OVERRIDES)
def test_a_config_is_the_same_after_yaml(values):
    config = load_config([], words(values))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        assert read_saved_config(path) == config
        assert load_config([path]) == config
    for name, value in values.items():
        section, key = name.rsplit(".", 1)
        found = config
        for part in section.split("."):
            found = getattr(found, part)
        if isinstance(getattr(found, key), str):
            assert getattr(found, key) == str(value)


@given(OVERRIDES, OVERRIDES, st.randoms(use_true_random=False))
def test_the_later_override_wins_and_order_does_not_matter(first, second, rng):
    expected = load_config([], words(first | second))
    assert load_config([], words(first) + words(second)) == expected
    shuffled = words(first | second)
    rng.shuffle(shuffled)
    assert load_config([], shuffled) == expected
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "first.yaml"
        path.write_text(to_yaml(load_config([], words(first))), encoding="utf-8")
        assert load_config([path], words(second)) == expected


@given(
    st.lists(st.tuples(st.sampled_from([*VALUES, "run", "sit.optim", ""]), st.text()), max_size=3)
)
def test_any_words_are_a_config_or_one_line(pairs):
    for words_given in ([f"{name}={text}" for name, text in pairs], [text for _, text in pairs]):
        try:
            load_config([], words_given)
        except UserError as error:
            message = str(error)
        else:
            message = "a config"
        assert message and len(message) < 2000
