"""One network is found in nested dicts and under prefixes, and never the wrong one."""

import itertools

import pytest
import torch

from models.checks.errors import UserError
from models.weights.finding import NotFound, find_state, tensor_names
from models.weights.objects import Placeholder
from models.weights.tensors import NoNumbers
from tests.weight_files import message

NET = {"enc.weight": torch.ones(2), "enc.bias": torch.zeros(1), "out.weight": torch.ones(3)}
KNOWN = (("enc.weight", "out.weight"),)


def under(prefix: str, state=NET) -> dict:
    return {prefix + name: value for name, value in state.items()}


def other(by: float = 1) -> dict:
    return {name: value + by for name, value in NET.items()}


def require_net(found, state=NET) -> None:
    assert found.state.keys() == state.keys()
    assert all(found.state[name] is state[name] for name in state)


PREFIXES = ("", "module.", "model.", "ema.", "ema_model.", "net.", "backbone.", "teacher.",
            "first_stage_model.", "vae.", "student.module.", "x.y.z.")  # fmt: skip
DICTS = ((), ("state_dict",), ("model",), ("ema",), ("params_ema",), ("checkpoint", "vae"))


@pytest.mark.parametrize("dicts", DICTS)
def test_any_dict_and_any_prefix_is_gone_through(dicts):
    for prefix in PREFIXES:
        beside = {"head.weight": torch.ones(5)} if prefix else {}
        content = under(prefix) | beside | {"n_averaged": 3}
        for name in reversed(dicts):
            content = {name: content, "epoch": 3, "optimizer": {"state": {0: torch.ones(9)}}}
        found = find_state(content, KNOWN, "w.pt")
        require_net(found)
        words = [".".join(dicts)] if dicts else []
        words += [f"without the prefix {prefix}"] if prefix else []
        assert found.where == ", ".join(words)


def test_wrappers_are_taken_away_also_inside_of_names():
    content = {"module._orig_mod.enc._orig_mod.weight": NET["enc.weight"],
               "module._orig_mod.enc._fsdp_wrapped_module.bias": NET["enc.bias"],
               "module._orig_mod.out._checkpoint_wrapped_module.weight": NET["out.weight"],
               }  # fmt: skip
    found = find_state({"model": content}, KNOWN, "w.pt")
    require_net(found)
    assert found.where.startswith("model, without the prefix module. and _checkpoint_wrapped")
    content = under("") | {"enc._orig_mod.weight": torch.ones(2)}
    with pytest.raises(UserError, match=r"two tensors for enc\.weight"):
        find_state(content, KNOWN, "w.pt")
    found = find_state({"my_orig_mod.weight": torch.ones(1)}, ("my_orig_mod.weight",), "w.pt")
    assert list(found.state) == ["my_orig_mod.weight"] and found.where == ""


def test_nested_dicts_are_one_network_where_its_keys_lie_in_several():
    content = {"enc": {"weight": NET["enc.weight"], "bias": NET["enc.bias"]},
               "out": {"weight": NET["out.weight"]}}  # fmt: skip
    require_net(find_state(content, KNOWN, "w.pt"))
    found = find_state({"net": content, "opt": under("")["enc.bias"]}, KNOWN, "w.pt")
    require_net(found)
    assert found.where == "net"


def test_what_lies_beside_or_below_the_network_is_left_out():
    beside = {"log": {"a": torch.ones(1)}, "epoch": 3, "seen": torch.ones(1), "names": ["a"]}
    require_net(find_state({"model": under("") | {"epoch": 3}, **beside}, KNOWN, "w.pt"))
    content = {"state_dict": under("") | under("ema.", NET | {"a.b": torch.ones(1)})}
    average = find_state(content, KNOWN, "w.pt", prefer=("ema",))
    require_net(average, NET | {"a.b": content["state_dict"]["ema.a.b"]})
    assert average.where == "state_dict, without the prefix ema."
    content["state_dict"] |= under("ema.", other())
    with pytest.raises(UserError, match=r"in state_dict and in state_dict\.ema"):
        find_state(content, KNOWN, "w.pt")
    content = {"net": under("") | under("ema."), "ema": other()}
    require_net(find_state(content, KNOWN, "w.pt", prefer=("net",)))  # without the one in it


def test_of_several_places_the_preferred_one_is_taken_whatever_their_order():
    places = {"model": under("module."), "ema": other(1), "teacher": {"net": other(2)}}
    for order in itertools.permutations(places):
        content = {name: places[name] for name in order}
        require_net(find_state(content, KNOWN, "w.pt", prefer=("none", "model", "ema")))
        found = find_state(content, KNOWN, "w.pt", prefer=("net", "ema"))
        assert found.where == "teacher.net" and found.state is not places["teacher"]["net"]


def test_places_that_differ_are_never_chosen_between():
    content = {"model": under(""), "ema": other()}
    with pytest.raises(UserError, match=r"several such networks, in model and in ema") as caught:
        find_state(content, KNOWN, "w.pt")
    assert not isinstance(caught.value, NotFound) and "w.pt" in message(caught)
    content["ema"] = {name: value.clone() for name, value in NET.items()}
    assert find_state(content, KNOWN, "w.pt").where == "model"  # equal ones are one
    content["ema"]["enc.bias"] = torch.tensor([-0.0])  # not the same bits
    with pytest.raises(UserError, match="several"):
        find_state(content, KNOWN, "w.pt")


def test_a_key_is_a_whole_name_and_all_keys_must_be_there():
    for content in (under("an"), {"enc.weight": torch.ones(2)}, {"out.weight.x": torch.ones(1)},
                    {"a": {"enc.weight": NET["enc.weight"]}, "b": {"out.weight": torch.ones(3)}},
                    [NET], None, {}, {"args": Placeholder("x.Y", (1,))}):  # fmt: skip
        with pytest.raises(NotFound, match=r"do not fit my net: it has no tensors enc\.weight and"):
            find_state(content, KNOWN, "w.pt", what="my net")
    alternatives = ("no.weight", ("out.weight", "enc.bias"))
    require_net(find_state(under("m."), alternatives, "w.pt"))


def test_a_tensor_of_the_network_that_has_no_numbers_is_named():
    content = under("") | {"enc.bias": NoNumbers("sparse_tensor")}
    with pytest.raises(UserError, match=r"tensor enc\.bias is not stored .*sparse_tensor"):
        find_state(content, KNOWN, "w.pt")
    content = {"model": under(""), "more": {"x": NoNumbers("sparse_tensor")}}
    require_net(find_state(content, KNOWN, "w.pt"))


def test_objects_hold_networks_too_and_circles_end():
    module = {"_parameters": {"weight": NET["enc.weight"], "bias": NET["enc.bias"]},
              "_buffers": {"tmp": torch.ones(1)}, "_modules": {},
              "_non_persistent_buffers_set": {"tmp"}}  # fmt: skip
    out = {"_parameters": {"weight": NET["out.weight"]}, "_buffers": {}, "_modules": {}}
    modules = {"enc": Placeholder("x.Enc", module), "out": Placeholder("x.Out", out)}
    whole = {"_parameters": {}, "_buffers": {}, "_modules": modules}
    content: dict = {"net": Placeholder("x.Net", whole)}
    content["self"] = content
    for _ in range(100):  # 2^100 paths
        content = {"a": content, "b": content}
    names = tensor_names(content)
    assert not names  # too deep for a weight file
    content = {"net": Placeholder("x.Net", whole)}
    content |= {"self": content, "again": content["net"]}
    require_net(find_state(content, KNOWN, "w.pt"))
    state = Placeholder("my.EasyDict", under("module."))
    require_net(find_state({"state": state}, KNOWN, "w.pt"))


@pytest.mark.parametrize("name", ["\x1b[2Jx", "two\nlines", "\u202ex"])
def test_names_in_a_file_do_nothing_to_the_terminal(name):
    """A title, a colour or a cleared screen could hide what a message says."""
    with pytest.raises(NotFound) as caught:
        find_state({name: torch.ones(1)}, KNOWN, "f.pt")
    assert message(caught).isprintable()
    assert find_state(under(f"{name}."), KNOWN, "f.pt").where.isprintable()


def test_names_that_are_made_to_be_long_cost_nothing():
    content = under("") | {"x" * 10**6: torch.ones(1), ("a",): torch.ones(1), 7: torch.ones(1)}
    assert max(map(len, tensor_names(content))) <= 500
    with pytest.raises(UserError) as caught:
        find_state({"x" * 10**6: torch.ones(1), Placeholder("k"): 1}, KNOWN, "w.pt")
    message(caught)
    with pytest.raises(UserError) as caught:
        find_state({Placeholder("k" * 10**6): 1, "y" * 10**6: 2}, (), "w.pt")
    message(caught)
