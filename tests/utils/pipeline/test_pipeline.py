"""RepaePipeline on a checkpoint: the pictures of sample_ddp.py, and the manners of diffusers.

python -m pytest tests/utils/pipeline/test_pipeline.py
"""

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from models.checks.errors import UserError
from tests.test_sample_ddp import assert_same_to_rounding, here
from utils.pipeline.pipeline import RepaePipeline
from utils.sealed import read_model_index

pytestmark = pytest.mark.usefixtures("one_thread")
SDE = {"num_inference_steps": 4, "solver": "sde", "guidance_interval": (0.1, 0.8)}
SDE |= {"guidance_scale": 2.0, "timestep_shift": 1.5}
FLAGS = {"steps": 4, "solver": "sde", "guidance_low": 0.1, "guidance_high": 0.8}
FLAGS |= {"cfg_scale": 2.0, "timestep_shift": 1.5}


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def draw(pipe, labels, generator=None, **changes) -> np.ndarray:
    how = {"num_inference_steps": 3, "output_type": "np", "generator": generator or seed(0)}
    return pipe(labels, **how | changes).images


# ---------------------------------------------------------------- the pictures


def test_the_pictures_are_those_of_sample_ddp(pipe, checkpoint, tmp_path):
    """Bit by bit, also where these come in several batches; labels by number or by name."""
    flags = FLAGS | {"num_samples": 70, "batch_size": 64, "seed": 5}
    expected = here(checkpoint, tmp_path / "a.npz", classes="yellow dog,6", **flags)
    assert np.array_equal(expected, draw(pipe, [1, 6] * 35, seed(5), **SDE))
    named = draw(pipe, ["Golden_Retriever", "OWL"] * 35, seed(5), **SDE)
    assert np.array_equal(expected, named)


@pytest.mark.usefixtures("native_halves")
def test_also_in_bfloat16_and_from_half_weights(pipe, checkpoint, tmp_path):
    flags = FLAGS | {"num_samples": 2, "precision": "bf16"}
    expected = here(checkpoint, tmp_path / "a.npz", classes="1,6", **flags)
    half = RepaePipeline.from_pretrained(checkpoint, torch_dtype={"sit_ema": torch.bfloat16})
    for one in (pipe, half):
        assert np.array_equal(expected, draw(one, [1, 6], **SDE))
    assert not np.array_equal(expected, draw(pipe, [1, 6], **SDE, precision="fp32"))


def test_also_of_the_qwen_family_and_of_its_latents(make_run, tmp_path):
    run = make_run("tiny-qwen", class_dropout_prob=0.0)
    expected = here(run, tmp_path / "a.npz", classes="2,3", num_samples=2, steps=3)
    pipe = RepaePipeline.from_pretrained(run)
    assert np.array_equal(expected, draw(pipe, [2, 3], solver="ode-heun"))
    z = draw(pipe, [2, 3], solver="ode-heun", output_type="latent")
    assert z.shape == (2, 16, 8, 8) and z.dtype == torch.float32
    x = pipe.vae.decode(z[:, :, None]).sample[:, :, 0]
    assert np.array_equal(expected, ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())


def test_forms_of_output(pipe):
    """Labels from tensors and arrays, too."""
    arrays = draw(pipe, torch.tensor([1, 2]))
    assert arrays.shape == (2, 16, 16, 3) and arrays.dtype == np.uint8
    tensor = draw(pipe, np.array([1, 2]), output_type="pt")
    assert tensor.dtype == torch.uint8 and np.array_equal(tensor.permute(0, 2, 3, 1), arrays)
    pipe.vae.enable_slicing()
    assert_same_to_rounding(arrays, draw(pipe, [1, 2]))
    pipe.vae.disable_slicing()
    pictures = pipe([1, 2], num_inference_steps=3, generator=seed(0)).images
    assert all(np.array_equal(picture, array) for picture, array in zip(pictures, arrays))
    (one,) = pipe(np.int64(1), num_inference_steps=3, generator=seed(0), return_dict=False)
    assert_same_to_rounding(np.asarray(one[0])[None], arrays[:1])


def test_smaller_batches_change_rounding_alone(pipe):
    whole = draw(pipe, [0, 1, 2, 3, 4], **SDE)
    assert_same_to_rounding(whole, draw(pipe, [0, 1, 2, 3, 4], **SDE, batch_size=2))


def test_generators(pipe):
    g = seed(3)
    first, second = draw(pipe, [1, 1], g), draw(pipe, [1, 1], g)
    assert np.array_equal(first, draw(pipe, [1, 1], seed(3)))
    assert len({image.tobytes() for image in (*first, *second)}) == 4
    again = seed(3)
    draw(pipe, [1], again)
    assert np.array_equal(second, draw(pipe, [1, 1], again))  # what a used one draws is repeatable
    several = draw(pipe, [1, 1], [seed(3), seed(4)], solver="sde")
    expected = [draw(pipe, [1], seed(s), solver="sde")[0] for s in (3, 4)]
    assert_same_to_rounding(several, np.stack(expected))
    torch.manual_seed(1)
    unseeded = pipe(1, num_inference_steps=3, output_type="np").images
    assert not np.array_equal(unseeded, pipe(1, num_inference_steps=3, output_type="np").images)
    torch.manual_seed(1)
    assert np.array_equal(unseeded, pipe(1, num_inference_steps=3, output_type="np").images)


# ---------------------------------------------------------------- callbacks


@pytest.mark.parametrize(("solver", "steps"), [("ode-ab2", 4), ("ode-heun", 3), ("sde", 3)])
def test_a_callback_sees_every_step_and_changes_nothing(solver, steps, pipe):
    seen = []

    def note(own, step, time, tensors):
        seen.append((step, time, own.num_timesteps, tensors["latents"].shape))
        return tensors

    how = {"solver": solver, "num_inference_steps": steps}
    watched = draw(pipe, [1, 2, 3], **how, batch_size=2, callback_on_step_end=note)
    assert np.array_equal(watched, draw(pipe, [1, 2, 3], **how, batch_size=2))
    assert [s[0] for s in seen] == [*range(steps)] * 2
    times = [s[1] for s in seen[:steps]]
    assert times == sorted(times, reverse=True) and times[-1] == 0 and times[0] < 1
    assert {s[2] for s in seen} == {steps} and seen[0][3] == (1, 4, 8, 8)


def test_a_callback_can_change_latents_and_end_the_call(pipe):
    zero = draw(pipe, [1], output_type="latent",
                callback_on_step_end=lambda *a: {"latents": 0 * a[3]["latents"]})  # fmt: skip
    assert torch.allclose(zero, torch.full((), 0.3))

    def stop(own, step, time, tensors):
        assert not tensors  # none were asked for
        own._interrupt = step == 1

    how = {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": []}
    early = draw(pipe, [1, 2, 3], **how, batch_size=2, num_inference_steps=50)
    assert len(early) == 1 and pipe.interrupt  # the first batch
    assert not np.array_equal(early, draw(pipe, [1], num_inference_steps=50))


def test_the_progress_bar_is_that_of_diffusers(checkpoint, capsys):
    pipe = RepaePipeline.from_pretrained(checkpoint)
    draw(pipe, [1, 2, 3], batch_size=2)
    assert "6/6" in capsys.readouterr().err  # two batches
    pipe.set_progress_bar_config(disable=True)
    draw(pipe, [1])
    assert not capsys.readouterr().err


# ---------------------------------------------------------------- wrong inputs


@pytest.mark.parametrize(
    ("labels", "changes", "said"),
    [
        ("golden retriver", {}, "class_labels: no class 'golden retriver': did you mean 'golden r"),
        ("CRANE", {}, r"'CRANE' names several classes, 2 \(Crane\), 3 \(crane\): give the number"),
        (8, {}, "class_labels: no class 8: the labels are 0 to 7"),
        ([], {}, "class_labels is empty"),
        (1.5, {}, r"class_labels=1\.5: expected labels or names"),
        ([True], {}, "class_labels: True is neither a label"),
        (None, {}, "class_labels=None: expected labels or names"),
        (1, {"guidance_scale": -1}, "guidance_scale=-1: expected a number from 0 to 1000"),
        (1, {"guidance_scale": float("nan")}, "guidance_scale=nan: expected a number"),
        (1, {"num_inference_steps": 2.0}, r"num_inference_steps=2\.0: expected a whole number"),
        (1, {"num_inference_steps": 1, "solver": "sde"}, "solver sde needs 2 or more"),
        (1, {"solver": "euler"}, "solver='euler': expected one of ode-euler, ode-heun, ode-ab2"),
        (1, {"guidance_interval": (0.5, 0.1)}, "the smaller time comes first"),
        (1, {"guidance_interval": 0.5}, r"guidance_interval=0\.5: expected two times"),
        (1, {"guidance_interval": (0, 2)}, "guidance_interval=2: expected a number from 0 to 1"),
        (1, {"timestep_shift": 0}, "timestep_shift=0: expected"),
        (1, {"batch_size": 0}, "batch_size=0: expected a whole number from 1"),
        (1, {"precision": "half"}, "precision='half': expected one of bf16, fp16, fp32"),
        (1, {"output_type": "jpg"}, "output_type='jpg': expected one of pil, np, pt, latent"),
        (1, {"generator": 3}, r"generator=3: expected torch\.Generator\(\)\.manual_seed"),
        ([1, 2], {"generator": [seed(0)]}, "a list of 1 for 2 images"),
        (1, {"callback_on_step_end_tensor_inputs": ["prompt"]}, r"expected \['latents'\]"),
        (1, {"callback_on_step_end_tensor_inputs": None}, r"_inputs=None: expected \['latents'\]"),
        (1, {"callback_on_step_end_tensor_inputs": [[]]}, r"_inputs=\[\[\]\]: expected"),
        (1, {"callback_on_step_end": lambda *a: {"latents": 3}}, "returned latents that are not"),
        (1, {"callback_on_step_end": lambda *a: 5}, r"not \(1, 4, 8, 8\): expected a dictionary"),
        (1, {"callback_on_step_end": lambda *a: {"latents": a[3]["latents"].numpy()}}, "that are"),
        (1, {"callback_on_step_end": 3}, "callback_on_step_end=3: expected a function"),
        (1, {"solver": []}, r"solver=\[\]: expected one of"),
        (b"3", {}, "class_labels=b'3': expected labels or names"),
        ({1, 2}, {}, r"class_labels=\{1, 2\}: expected labels or names"),
        (torch.nn.MultiheadAttention(4, 1), {}, r"class_labels=MultiheadAttention\( \(out_proj"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(labels, changes, said, pipe):
    with pytest.raises(UserError, match=said) as error:
        pipe(labels, **{"num_inference_steps": 3, "generator": seed(0)} | changes)
    assert "\n" not in str(error.value)


def test_guidance_and_precision_that_the_weights_cannot_give(make_run, checkpoint):
    pipe = RepaePipeline.from_pretrained(make_run(class_dropout_prob=0.0))
    with pytest.raises(UserError, match=r"guidance_scale=2\.0: this SiT was trained without a nul"):
        pipe(1, 2.0)
    pipe = RepaePipeline.from_pretrained(checkpoint, dtype=torch.float16)
    assert pipe(1, num_inference_steps=2).images[0].size == (16, 16)
    with pytest.raises(UserError, match="precision='fp32': the weights of the SiT are fp16"):
        pipe(1, precision="fp32")


def test_weights_that_make_no_numbers(checkpoint):
    pipe = RepaePipeline.from_pretrained(checkpoint)
    torch.nn.init.constant_(pipe.sit_ema.final_layer.linear.bias, 3e38)
    with pytest.raises(UserError, match=r"images 0\.\.1 are not finite: try precision='fp32'"):
        draw(pipe, [1, 2])


# ---------------------------------------------------------------- loading


def test_a_checkpoint_is_a_folder_of_diffusers(checkpoint, pipe):
    """By its model_index.json, diffusers itself finds the components."""
    index = json.loads((checkpoint / "model_index.json").read_text())
    assert index["_class_name"] == "RepaePipeline" and index["path"] == "linear"
    assert index["vae"] == ["diffusers", "AutoencoderKL"] and index["id2label"]["6"] == "owl"
    assert "5" not in index["id2label"]  # nobody knows its name
    state = json.loads((checkpoint / "state.json").read_text())
    assert "model_index.json" in state["files"]
    theirs = super(RepaePipeline, RepaePipeline).from_pretrained(checkpoint)
    theirs.set_progress_bar_config(disable=True)
    assert isinstance(theirs, DiffusionPipeline)
    assert np.array_equal(draw(theirs, ["owl"]), draw(pipe, ["owl"]))


def test_a_run_and_a_checkpoint_of_an_older_version(make_run, capsys):
    """Without model_index.json, state.json knows the interpolant and the classes."""
    old = make_run(path="cosine", index=False)
    assert not (old / "model_index.json").exists()
    pipe = RepaePipeline.from_pretrained(old.parent.parent)
    assert "taking its newest whole checkpoint" in capsys.readouterr().out
    assert pipe.config.path == "cosine" and pipe.config.solver == "ode-ab2"
    new = RepaePipeline.from_pretrained(make_run(path="cosine"))
    assert np.array_equal(draw(pipe, "tench"), draw(new, 0))
    linear = RepaePipeline.from_pretrained(old, path="linear")
    assert not np.array_equal(draw(pipe, "tench", solver="sde"), draw(linear, 0, solver="sde"))


def test_loading_is_strict_and_needs_no_projector(make_run):
    run = make_run(index=False)
    (run / "state.json").unlink()  # it would say that the file is another
    assert not RepaePipeline.from_pretrained(run).sit_ema.projectors
    file = run / "sit_ema" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("final_layer.linear.bias")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing \(final_layer"):
        RepaePipeline.from_pretrained(run)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"path": "quadratic"}', "path='quadratic': expected one of linear, cosine"),
        ('{"id2label": {"dog": "dog"}}', "id2label: expected names by their label"),
        ('{"id2label": ["dog"]}', "id2label=.*: expected an object"),
        ("vae", "is no valid JSON"),
    ],
)
def test_a_model_index_that_is_none(content, said, tmp_path):
    assert read_model_index(tmp_path).path is None
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(UserError, match=said):
        read_model_index(tmp_path)


def test_what_cannot_be_loaded(checkpoint, tmp_path):
    cases: list[tuple[tuple, dict[str, Any], str]] = [
        ((checkpoint,), {"variant": "fp16"}, "from_pretrained knows no variant: expected vae"),
        ((checkpoint,), {"torch_dtype": "bf16"}, "torch_dtype='bf16': expected torch"),
        ((checkpoint,), {"torch_dtype": torch.int8}, r"torch_dtype=torch\.int8: expected torch"),
        ((checkpoint,), {"dtype": {"sit": torch.float16}}, "no component 'sit': expected sit_ema"),
        ((checkpoint,), {"id2label": ["cat", "dog"]}, r"id2label=\['cat', 'dog'\]: expected the"),
        ((checkpoint,), {"id2label": {"cat": 0}}, "id2label={'cat': 0}: expected the names"),
        ((checkpoint,), {"id2label": {"0": None}}, "id2label={'0': None}: expected the names"),
        ((checkpoint,), {"vae": None}, "vae=None: expected a network"),
        ((checkpoint,), {"solver": "ddim"}, "solver='ddim': expected one of"),
        ((tmp_path / "absent",), {}, "no such folder"),
    ]
    for words, changes, said in cases:
        with pytest.raises(UserError, match=said):
            RepaePipeline.from_pretrained(*words, **changes)


def test_what_is_saved_is_what_loads(pipe, tmp_path):
    """One file for each network, under the name that all programs of this repository read."""
    (tmp_path / "file").touch()
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("a", {"variant": "fp16"}, "variant='fp16': each network is written as one file"),
        ("a", {"max_shard_size": "100KB"}, "max_shard_size='100KB': each network"),
        ("a", {"safe_serialization": False}, "only safetensors"),
        ("file", {}, "file is a file: name a folder"),
    ]
    for place, changes, said in cases:
        with pytest.raises(UserError, match=said):
            pipe.save_pretrained(tmp_path / place, **changes)
        assert not (tmp_path / "a").exists()
