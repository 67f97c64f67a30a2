"""A new run with run.init_from: what it takes, what it makes anew, what it refuses; run.init_new.

python -m pytest tests/utils/training/starting/test_inheritance.py
"""

import json
import re
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from models.checks.errors import UserError
from models.sit import SiT, sincos_pos_embed
from models.vae import build_vae
from models.weights.configs import CONFIG, WEIGHTS
from tests.sharded_ranks import require_equal, weights
from tests.started_ranks import steps, write
from tests.tiny import TINY, run_script, start, tiny_config
from utils import distributed
from utils.checkpoint import contents_of
from utils.config.load import load_config
from utils.config.schema import Config
from utils.data.training import open_training_data
from utils.sealed import STATE, seal_checkpoint
from utils.training.networks import Networks, build_disc, build_networks, load_or_initialize_sit
from utils.training.plan import Plan, check_run
from utils.training.starting import inheritance
from utils.training.starting.fitting import require_same_vae, require_whole
from utils.training.starting.inheritance import Inheritance, inherit
from utils.training.starting.learned import read_learned

DIMS = {"timm:test_resnet/16": 192, "timm:test_vit": 64}  # channels
DIGITS, PETS = list("0123456789"), ["cat", "dog", "owl"]
LABELS = "y_embedder.embedding_table.weight"
# another encoder beside that of TINY, and another number of tokens
WIDER = (
    "encoder.names=[timm:test_vit,timm:test_resnet/16]",
    *("encoder.weights=[random,random]", "encoder.grid=8", "data.resolution=32"),
)
ALL = "run.init_new=[projectors,classes,pos_embed]"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run with one checkpoint; SiT and EMA differ."""
    run = tmp_path_factory.mktemp("out") / "first"
    c = tiny_config()
    nets, _ = start(c)
    with torch.no_grad():
        for p in nets.ema.parameters():
            p.mul_(0.5)
    write(nets, c, run / "checkpoints" / "0000002", DIGITS)
    return run


@pytest.fixture(scope="module")
def origin(run) -> Path:
    return run / "checkpoints" / "0000002"


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> str:
    """Images of three classes, as arguments."""
    folder = tmp_path_factory.mktemp("pets")
    for name in PETS:
        (folder / name).mkdir()
        for i in range(3):
            Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(folder / name / f"{i}.png")
    return f"data.source=folder data.path={folder}"


def edit(origin: Path, to: Path, change, sit: dict | None = None, **state) -> Path:
    """A copy of a checkpoint whose SiTs have gone through `change`, and whose state is `state`."""

    def write(folder: Path) -> None:
        shutil.copytree(origin, folder, dirs_exist_ok=True)
        (folder / STATE).unlink()
        for name in ("sit", "sit_ema"):
            save_file(change(load_file(folder / name / WEIGHTS)), folder / name / WEIGHTS)
            config = json.loads((folder / name / CONFIG).read_text())
            (folder / name / CONFIG).write_text(json.dumps(config | (sit or {})))

    return seal_checkpoint(to, 0, write, {"imported": True} | state)


def without_projectors(state: dict) -> dict:
    return {k: v for k, v in state.items() if not k.startswith("projectors.")}


def plan(origin: Path, *words: str) -> Plan:
    return check_run(tiny_config(f"run.init_from={origin}", "run.name=next", *words), 1)


def networks(origin: Path | None, *words: str) -> Networks:
    c = tiny_config(*([f"run.init_from={origin}"] if origin else []), *words)
    accelerator = distributed.start(c.run_dir, [], tf32=False)
    return build_networks(c, open_training_data(c), accelerator)[0]


def inherited(origin: Path, *words: str, classes=DIGITS) -> Inheritance:
    """What a run of these settings takes over, without the encoders, which take a second."""
    c = tiny_config(f"run.init_from={origin}", *words)
    with torch.device("meta"):
        disc = build_disc(c, None) if c.uses_disc else None
    return inherit(c, origin, random_sit(c, classes), disc, classes)


def random_sit(c: Config, classes: list[str]) -> SiT:
    dims = tuple(DIMS[name] for name in c.encoder.names) if c.uses_encoder else ()
    with torch.device("meta"):
        vae = build_vae(c.vae.name)
    return load_or_initialize_sit(c, vae, len(classes), dims, torch.device("cpu"), None)


def new_sit(found: Inheritance, *words: str, classes=DIGITS, name: str = "sit") -> dict:
    """Weights of a random SiT that has taken over what is `found`."""
    sit = random_sit(tiny_config(*words), classes)
    found.load_sit(sit, name)
    return sit.state_dict()


def test_where_all_fits_all_is_carried_over_and_nothing_is_called_new(origin):
    nets = networks(origin)
    for name, net in (("sit", nets.sit), ("sit_ema", nets.ema)):
        there = load_file(origin / name / WEIGHTS)
        assert all(torch.equal(value, there[key]) for key, value in net.state_dict().items())
    found = inherited(origin)
    assert not found.sit_changes and not found.notes
    assert all(line.startswith("carried over: ") for line in found.lines)


def test_what_fits_is_kept_bit_by_bit_and_the_rest_is_as_in_a_new_run_of_that_seed(origin, pets):
    """In SiT and EMA; the null row and the projector of the old encoder have another place."""
    words = [*pets.split(), *WIDER]
    nets, fresh = networks(origin, *words, ALL), random_sit(tiny_config(*words), PETS).state_dict()
    for name, net in (("sit", nets.sit), ("sit_ema", nets.ema)):
        there, here = load_file(origin / name / WEIGHTS), net.state_dict()
        own = [key for key in here if key.startswith("projectors.0.")]
        assert own and all(torch.equal(here.pop(key), fresh[key]) for key in own)
        assert torch.equal(here.pop("pos_embed"), sincos_pos_embed(32, 8)[None])
        table = here.pop(LABELS)
        assert torch.equal(table[:3], fresh[LABELS][:3])
        assert torch.equal(table[3], there[LABELS][10])
        for key, value in here.items():
            assert torch.equal(value, there[key.replace("projectors.1.", "projectors.0.")]), key


def test_the_plan_says_it_line_by_line_and_reads_no_weights(origin, pets, monkeypatch):
    monkeypatch.delattr(inheritance, "read_state")
    found = plan(origin, *pets.split(), *WIDER, "run.init_new=[classes,pos_embed,projectors,disc]")
    text = "\n".join([*found.inherited.lines, *found.notes])
    for line in (
        "carried over: VAE, latent norm, SiT of 3 blocks of width 32, its EMA",
        "carried over: projectors: of timm:test_resnet/16",
        "carried over: classes: the null row",
        "carried over: disc: ",
        "left out: classes: 10 of 10 rows",
        "new: projectors: of timm:test_vit ",
        "new: classes: 3 of 3 rows, random (cat, dog, owl)",
        "new: pos_embed: 8x8 tokens, the fixed table",
        "run.init_new names disc, of which nothing is new",
    ):
        assert line in text


CHANGES = {
    "projectors": ["sit.projector=conv"],
    "classes": [],  # other data
    "pos_embed": ["data.resolution=32", "encoder.grid=8"],
    "disc": ["disc.channels=16"],
}


@pytest.mark.parametrize("count", [1, 4])
def test_each_new_part_must_be_named_and_the_message_says_how(count, origin):
    """For choices of changes: the refusal asks for just these parts, also if one is named."""
    for names in combinations(CHANGES, count):
        words = [word for name in names for word in CHANGES[name]]
        classes = PETS if "classes" in names else DIGITS
        expected = f"run.init_new=[{','.join(names)}]"
        for given in {"run.init_new=[]", f"run.init_new=[{names[-1]}]"} - {expected}:
            with pytest.raises(UserError, match=re.escape(expected)) as caught:
                inherited(origin, *words, given, classes=classes)
            assert "\n" not in str(caught.value)
        found = inherited(origin, *words, expected, classes=classes)
        assert {name for name, part in found.parts.items() if part.new} == {*names}


@pytest.mark.parametrize(
    "setting", ["hidden_size=48", "depth=4", "num_heads=4", "patch_size=4", "qk_norm=true"]
)
def test_another_network_is_refused_with_the_setting_of_the_checkpoint(setting, origin):
    """Heads show in no shape of a tensor."""
    grid = f"encoder.grid={2 if 'patch' in setting else 4}"
    with pytest.raises(UserError, match="holds a SiT of") as caught:
        inherited(origin, f"sit.{setting}", grid)
    remedy = str(caught.value).rpartition("set ")[2].split()
    assert not inherited(origin, f"sit.{setting}", *remedy, "encoder.grid=4").sit_changes


def test_another_vae_and_a_sit_that_is_not_what_its_config_says_are_refused(origin, tmp_path):
    with pytest.raises(UserError, match=r"leave vae\.name out"):
        require_same_vae(tiny_config("vae.name=tiny-f8d4"), origin)
    with pytest.raises(UserError, match=r"mlp\.fc1"):
        require_whole(edit(origin, tmp_path / "wide", lambda s: s, {"mlp_ratio": 2.0}))


def test_an_import_without_projectors_or_null_row_is_taken(origin, tmp_path):
    def change(state: dict) -> dict:
        state[LABELS] = state[LABELS][:10].clone()
        return {k: v for k, v in state.items() if not k.startswith("projectors.")}

    config = {"encoder_dims": [], "class_dropout_prob": 0.0}
    bare = edit(origin, tmp_path / "bare", change, config)
    require_whole(bare)
    with pytest.raises(UserError, match=r"run\.init_new=\[projectors,classes\]"):
        inherited(bare)
    found = inherited(bare, "run.init_new=[projectors]", "sit.class_dropout_prob=0")
    there = load_file(bare / "sit" / WEIGHTS)
    assert torch.equal(new_sit(found, "sit.class_dropout_prob=0")[LABELS], there[LABELS])
    words = ("loss.align.sit=0", "loss.align.vae=0", "sit.class_dropout_prob=0")
    assert not inherited(bare, *words).sit_changes


def test_what_is_no_longer_needed_is_left_out_without_a_word_in_init_new(origin):
    words = ("loss.align.sit=0", "loss.align.vae=0", "sit.class_dropout_prob=0", "loss.reg.gan=0")
    found = inherited(origin, *words)
    left = [line.split(": ")[1] for line in found.lines if line.startswith("left out")]
    assert left == ["projectors", "classes"]
    state, there = new_sit(found, *words), load_file(origin / "sit" / WEIGHTS)
    assert torch.equal(state[LABELS], there[LABELS][:10]) and "projectors.0.0.bias" not in state


def test_classes_of_the_same_name_keep_their_rows(origin, tmp_path):
    names = [f"x{i}" for i in range(7)] + ["owl", "fox", "cat"]
    named = edit(origin, tmp_path / "named", lambda s: s, classes=names)
    found = inherited(named, "run.init_new=[classes]", classes=PETS)
    for name in ("sit", "sit_ema"):
        table, there = new_sit(found, classes=PETS)[LABELS], load_file(named / name / WEIGHTS)
        assert torch.equal(table[[0, 2, 3]], load_file(named / "sit" / WEIGHTS)[LABELS][[9, 7, 10]])
        assert not any(torch.equal(table[1], row) for row in there[LABELS])


def test_what_cannot_be_known_is_said_and_init_new_decides(origin, tmp_path):
    """An import knows neither its classes nor its encoders; here both have the shapes of ours."""
    dit = {"predicts": "noise"}
    unknown = edit(origin, tmp_path / "unknown", lambda s: s, path="cosine", source=dit)
    notes = inherited(unknown).notes
    assert sum("run.init_new" in note for note in notes) == 2
    assert any("loss.diffusion.path=linear" in note for note in notes)
    assert any("has learned to predict noise" in note for note in notes)
    found = inherited(unknown, "run.init_new=[projectors,classes]")
    assert {n for n, part in found.parts.items() if part.new} == {"projectors", "classes"}
    here, there = new_sit(found), load_file(unknown / "sit" / WEIGHTS)
    assert not torch.equal(here["projectors.0.0.weight"], there["projectors.0.0.weight"])
    assert torch.equal(here[LABELS][10], there[LABELS][10])
    assert not any(torch.equal(*rows) for rows in zip(here[LABELS][:10], there[LABELS]))


def test_an_import_that_names_its_encoder_as_repa_does_is_believed(origin, tmp_path):
    source = {"args": {"enc_type": "dinov2-vit-b"}}
    known = edit(origin, tmp_path / "known", lambda s: s, source=source)
    assert read_learned(tiny_config(), known).encoders == ["dinov2-b"]
    with pytest.raises(UserError, match=r"run\.init_new=\[projectors\]"):
        inherited(known)


def test_a_trained_position_table_is_resized_in_sit_and_ema(origin, tmp_path):
    trained = edit(
        origin, tmp_path / "a", lambda s: s | {"pos_embed": torch.ones_like(s["pos_embed"])}
    )
    words = ("data.resolution=32", "encoder.grid=8", "run.init_new=[pos_embed]")
    found = inherited(trained, *words)
    assert "trained table" in found.parts["pos_embed"].new
    for name in ("sit", "sit_ema"):
        table = new_sit(found, *words[:2], name=name)["pos_embed"]
        torch.testing.assert_close(table, torch.ones(1, 64, 32))


def test_a_discriminator_is_lost_only_if_that_is_named(origin, tmp_path):
    words = ("disc.channels=16", "run.init_new=[disc]")
    assert networks(origin, *words).disc.main[0].out_channels == 16
    bare = edit(origin, tmp_path / "bare", lambda s: s)
    (bare / "discriminator.safetensors").unlink()
    with pytest.raises(UserError, match="is missing"):
        require_whole(bare)
    (bare / STATE).unlink()
    assert "new: disc: random, as the checkpoint has none" in inherited(bare).lines


def test_a_checkpoint_that_is_not_whole_is_refused(origin, tmp_path):
    other = shutil.copytree(origin, tmp_path / "other")
    with (other / "sit" / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(UserError, match=r"sit/.* is damaged"):
        require_whole(other)
    (other / STATE).unlink()
    require_whole(other)  # nothing vouches for it
    for change, words in (({"num_heads": 4}, "different networks"), ({"depth": 2}, "do not fit")):
        config = json.loads((origin / "sit_ema" / CONFIG).read_text())
        (other / "sit_ema" / CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=words):
            require_whole(other)


def test_without_the_data_the_classes_are_taken_to_be_those_of_the_checkpoint(origin, tmp_path):
    c = tiny_config(f"run.init_from={origin}", "run.name=next", "data.source=folder",
                    f"data.path={tmp_path}/absent")  # fmt: skip
    found = check_run(c, 1, assume_data=True)
    assert found.nets.sit.config.num_classes == 10 and not found.inherited.sit_changes


def test_a_run_means_its_newest_checkpoint_until_the_new_run_has_begun(run, tmp_path):
    first = shutil.copytree(run, tmp_path / "first")
    for given in (first, first / "checkpoints"):
        c = load_config([], [f"run.init_from={given}", "run.trackers=[]"])
        assert c.run.init_from == str(first / "checkpoints" / "0000002")
        assert c.vae.name == f"{c.run.init_from}/vae"
    (first / "checkpoints" / "0000004").mkdir()  # not whole
    begun = tmp_path / "next" / "checkpoints" / "0000002"
    begun.mkdir(parents=True)
    saved = "run: {init_from: " + str(first / "checkpoints" / "0000001") + "}"
    (tmp_path / "next" / "config.yaml").write_text(saved)
    words = (*TINY, f"run.init_from={first}", f"run.out={tmp_path}")
    for more, step in (
        (["run.name=other"], "0000002"),
        (["run.name=next"], "0000001"),  # although it is gone
        (["run.name=third", f"run.resume={begun}"], "0000001"),
    ):
        assert load_config([], [*words, *more]).run.init_from.endswith(step)
    shutil.rmtree(first / "checkpoints" / "0000002")
    with pytest.raises(UserError, match="no whole checkpoint yet"):
        load_config([], [*words, "run.name=other"])


# --------------------------------------------------------------------------------------
# Training from it.


def test_a_run_that_goes_on_is_bit_equal_and_reads_its_origin_no_more(origin, pets, tmp_path):
    first = shutil.copytree(origin, tmp_path / "first")
    c = tiny_config(f"run.init_from={first}", *pets.split(), "run.init_new=[classes]")
    source, accelerator = open_training_data(c), distributed.start(c.run_dir, [], tf32=False)
    nets, _ = build_networks(c, source, accelerator)
    shutil.rmtree(first)
    steps(nets, c, range(1))
    write(nets, c, tmp_path / "own", source.classes)
    resumed, _ = build_networks(c, source, accelerator, tmp_path / "own")
    for each in (nets, resumed):
        steps(each, c, range(1, 2))
    require_equal(contents_of(resumed).optimizers, contents_of(nets).optimizers)
    require_equal(weights(resumed), weights(nets))


@pytest.mark.slow
def test_two_ranks_begin_as_one_and_go_on_with_shares_of_the_optimizer(run, pets, tmp_path):
    """Two ranks compare weights and EMA with each other and with those of a resumed run."""
    words = [*pets.split(), "sit.projector=conv", "run.init_new=[projectors,classes]"]
    more = (f"run.init_from={run}", "run.shard_optimizer=true")
    done = run_script("tests/started_ranks.py", tmp_path, *words, *more, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    alone = networks(run / "checkpoints" / "0000002", *words)
    there = torch.load(tmp_path / "start.pt", weights_only=True)
    require_equal(there, weights(alone))
