"""From YAML files and `key=value` overrides to a checked `Config`, and back to YAML."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import Field, asdict
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from models.autoencoders.families import VAES
from models.autoencoders.names import short_name
from models.backbones.names import canonical
from models.checks.errors import UserError
from utils.config.reading import as_mapping, parse_yaml, read_yaml, show, show_text
from utils.config.resuming import FREE, is_in
from utils.config.schema import Config, all_settings
from utils.config.validate import config_errors
from utils.config.values import convert, override_node
from utils.files import expand_path
from utils.sealed import STATE, read_state_json

# The file in a run's folder that holds its settings.
CONFIG_FILE = "config.yaml"
# Settings that have another name now. `load_config` refuses them, but for flags, whose values have
# other words in their successors.
RENAMED = {
    "disc.alone_steps": "disc.pretrain_steps",
    "loss.diffusion.to_vae": "loss.diffusion.vae",
    "run.gradient_checkpointing": "run.checkpointing",
}
FLAGS = {
    "loss.diffusion.to_vae": {"true": "1.0", "false": "0.0"},
    "run.gradient_checkpointing": {"true": "both", "false": "none"},
}
SETTINGS: dict[str, Field] = {name: declared for name, declared, _ in all_settings(Config())}
SECTIONS = {name.rsplit(".", n)[0] for name in SETTINGS for n in range(1, name.count(".") + 1)}

# A layer is {full name: node} of a file or of all overrides; a later layer wins.
Layer = dict[str, Node]


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Merge the defaults, the files in order (each after its `base:`) and `key=value` overrides; of
    two overrides of a setting the later wins. Paths are expanded. A `UserError` names what is
    wrong, in one line: unknown or renamed settings, values of the wrong type, and whatever
    `config_errors` finds."""
    layers = [layer for path in files for layer in _read_with_bases(Path(expand_path(str(path))))]
    layers = [_renamed(layer, old_names=False) for layer in (*layers, _read_overrides(overrides))]
    config = _build(layers, expand=True)
    _inherit(config, {name for layer in layers for name in layer})
    if errors := config_errors(config):
        raise UserError("; ".join(errors))
    return config


def read_saved_config(path: str | Path) -> Config:
    """Read the config.yaml that a run has saved, also one of an older version of this code. Nothing
    is checked but names and types: what it names (a checkpoint to start from, a tracker) need not
    be here any more. `UserError` if the file cannot be read."""
    layer = dict(_settings_in(read_yaml(Path(path)), str(path)))
    return _build([_renamed(layer, old_names=True)], expand=False)


def recorded_config(checkpoint: Path, now: Config) -> Config | None:
    """The settings with which a checkpoint was written: those that it has recorded itself, or for
    one of an older version those in its run's folder; None if there are none. Settings that are
    free to change may be recorded nowhere; they are then those of `now`."""
    config, state = Config(), str(checkpoint / STATE)
    for name, _, value in all_settings(now):
        if is_in(name, FREE):
            _set(config, name, value)
    path = checkpoint.absolute().parents[1] / CONFIG_FILE
    own = read_state_json(checkpoint).config
    roots = {}
    try:
        roots |= {str(path): read_yaml(path)} if path.is_file() else {}
    except UserError:
        if not own:
            raise
    if own:  # JSON is YAML
        roots[state] = as_mapping(parse_yaml(json.dumps(own), state), state)
    layers = [dict(_settings_in(root, origin)) for origin, root in roots.items()]
    layers = [_renamed(layer, old_names=True) for layer in layers]
    return _build(layers, expand=False, config=config) if layers else None


def to_yaml(config: Config) -> str:
    """Every setting, also those at their defaults."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=10_000)


def flat(tree: dict, prefix: str = "") -> dict:
    """Turn nested dictionaries into one: {"a": {"b": 1}} becomes {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, part in tree.items() for k, v in flat(part, f"{prefix}{name}.").items()}


def _inherit(config: Config, given: set[str]) -> None:
    """With `run.init_from`, the VAE is that of the checkpoint, and the config says so; of a run, it
    is the checkpoint that is meant. `given`: the settings that a file or an override names."""
    if config.vae.name not in VAES:
        config.vae.name = _origin(config, "vae.name")
    if config.run.init_from is None:
        return
    origin = config.run.init_from = _origin(config, "run.init_from")
    if "vae.weights" in given and config.vae.weights is not None:
        raise UserError(
            f"run.init_from={origin} brings the weights of the VAE, and vae.weights="
            f"{config.vae.weights} names others: set vae.weights=null, or run.init_from=null"
        )
    config.vae.weights = None
    if "vae.name" not in given:
        config.vae.name = str(Path(origin) / "vae")


def _origin(config: Config, name: str) -> str:
    """The checkpoint that a setting means which may name a run. A run that has begun with one of a
    run's folder stays with that: newer ones, or none, may be there by now."""
    text = str(_get(config, name))
    given, resumed = Path(text), Path(config.run.resume).absolute()
    for begun in (config.run_dir, resumed, resumed.parent.parent):
        saved = _saved(begun, name)
        if saved and given.resolve() in [*Path(saved).resolve().parents[:2]]:
            return saved
    if not os.path.isdir(given / "checkpoints") and given.name != "checkpoints":
        return text
    from utils.checkpoint import newest_of  # imports torch

    # its bytes are read in the plan, which one rank makes
    return str(newest_of(given, report=lambda _: None, read_all=False))


def _saved(run: Path, name: str) -> str | None:
    """A setting of a run that has begun; None without one, or if it cannot be read."""
    if not any((run / "checkpoints").glob("[0-9]*")):
        return None
    try:
        return _get(read_saved_config(run / CONFIG_FILE), name)
    except UserError:
        return None


def _get(config: Config, name: str) -> Any:
    return reduce(getattr, name.split("."), config)


# --------------------------------------------------------------------------------------
# Layers: what files and overrides name.


def _read_with_bases(path: Path) -> list[Layer]:
    """The settings of a file, after those of the file that its `base:` names, relative to it."""
    layers: list[Layer] = []
    followed: list[Path] = []
    while True:
        root = read_yaml(path)
        if path.resolve() in followed:
            raise UserError(f"{path} is its own base: remove one `base:`")
        followed.append(path.resolve())
        layer = dict(_settings_in(root, str(path)))
        layers.insert(0, layer)
        base = layer.pop("base", None)
        if base is None:
            return layers
        if not isinstance(base, ScalarNode):
            raise UserError(f"{path}: base={show(base)}: expected the path of one config")
        if not base.style and base.value in ("", "null", "~"):
            return layers
        path = path.parent / expand_path(base.value)


def _settings_in(section: MappingNode, origin: str, prefix: str = "") -> Iterator[tuple[str, Node]]:
    """(full name, node) of every setting in a section; `UserError` for unknown or double names."""
    seen: set[str] = set()
    for key, node in section.value:
        name = f"{prefix}{key.value if isinstance(key, ScalarNode) else show(key)}"
        if name in seen:
            raise UserError(f"{origin}: {name} stands there twice: remove one")
        seen.add(name)
        if name in SECTIONS and isinstance(node, MappingNode):
            yield from _settings_in(node, origin, f"{name}.")
        elif name in SECTIONS and isinstance(node, ScalarNode) and not node.value:
            continue  # a section all of whose settings are comments
        elif name == "base" or _require_known(name, f"{origin}: "):
            yield name, node


def _read_overrides(overrides: Sequence[str]) -> Layer:
    layer: Layer = {}
    for word in overrides:
        shown = show_text(word)
        name, equals, text = word.partition("=")
        if word.startswith("-") and name.lstrip("-") in SETTINGS:
            raise UserError(f"'{shown}' is no flag: write {shown.lstrip('-')} for a setting")
        if word.startswith("-"):
            raise UserError(f"'{shown}' is no flag of this program, and is no override: write "
                            "key=value, e.g. run.steps=1000; see --help")  # fmt: skip
        if name == "base" or (not equals and word.endswith((".yaml", ".yml"))):
            raise UserError(f"'{shown}' is no override: name a config by --config FILE")
        if not equals:
            raise UserError(f"'{shown}' is no override: write key=value, e.g. run.steps=1000")
        _require_known(name)
        layer[name] = override_node(text, SETTINGS.get(name) or SETTINGS[RENAMED[name]], name)
    return layer


def _renamed(layer: Layer, old_names: bool) -> Layer:
    """`layer` with new names in place of old ones."""
    for old, new in RENAMED.items():
        if old not in layer:
            continue
        node = layer.pop(old)
        if new in layer:
            raise UserError(f"{old} is the old name of {new}, which is given too: remove one")
        if words := FLAGS.get(old):
            if show(node) not in words:
                raise UserError(f"{old}={show(node)}: use {new} instead of the flag")
            node = ScalarNode(node.tag, words[show(node)])
        elif not old_names:
            raise UserError(f"{old} is now called {new}: rename it")
        layer[new] = node
    return layer


def _require_known(name: str, origin: str = "") -> bool:
    """True; `UserError` unless `name` is a setting, with the names that may have been meant."""
    if name in SETTINGS or name in RENAMED:
        return True
    if name in SECTIONS:
        example = next(n for n in SETTINGS if n.startswith(f"{name}."))
        raise UserError(
            f"{origin}{name} is a section of settings: name one of them, e.g. {example}"
        )
    near = [f"'{n}'" for n in _near(name)]
    hint = f" Did you mean: {' or '.join(near)}?" if near else " See utils/config/schema.py."
    raise UserError(f"{origin}no setting is called '{show_text(name)}'.{hint}")


def _near(name: str) -> list[str]:
    """Up to three settings that an unknown name may have meant: first those with the same last
    name, or the same last names, in another section; then those that are spelt alike."""
    section, _, last = name.rpartition(".")
    for ending in dict.fromkeys((name, last)):
        if found := [n for n in SETTINGS if n.endswith(f".{ending}")]:
            return found[:3]
    name = name[:100].lower()
    inside = [n for n in SETTINGS if n.startswith(f"{section}.")]
    return (
        get_close_matches(name, inside, 1, 0.6)
        or get_close_matches(name, SETTINGS, 1, 0.6)
        or [n for n in SETTINGS if n.endswith(tuple(f".{m}" for m in _near_last(last[:100])))][:3]
    )


def _near_last(last: str) -> list[str]:
    return get_close_matches(last, {n.rpartition(".")[2] for n in SETTINGS}, 1, 0.7) or [" "]


# --------------------------------------------------------------------------------------
# From layers to a `Config`.


def _build(layers: Sequence[Layer], expand: bool, config: Config | None = None) -> Config:
    """The defaults, or `config`, under the layers, later ones above; `expand`: paths are
    expanded."""
    nodes = {name: node for layer in layers for name, node in layer.items()}
    config = config or Config()
    for name, node in nodes.items():
        _set(config, name, convert(node, SETTINGS[name], name, expand))
    config.encoder.names = [canonical(name) for name in config.encoder.names]
    config.vae.name = short_name(config.vae.name)
    return config


def _set(config: Config, name: str, value: Any) -> None:
    *sections, last = name.split(".")
    owner: Any = config
    for section in sections:
        owner = getattr(owner, section)
    setattr(owner, last, value)
