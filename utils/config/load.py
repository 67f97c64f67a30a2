"""From YAML files and `key=value` overrides to a checked `Config`, and back to YAML."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from models.errors import UserError
from utils.config.schema import Config, all_settings
from utils.config.validate import config_errors

# The file in a run's folder that holds its settings.
CONFIG_FILE = "config.yaml"
# Settings that have another name now. `load_config` refuses them, but for the flag, which has
# become a weight: false and true are read as 0 and 1.
FLAG = "loss.diffusion.to_vae"
RENAMED = {"disc.alone_steps": "disc.pretrain_steps", FLAG: "loss.diffusion.vae"}


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Merge the defaults, the files in order (each after its `base:`) and `key=value` overrides. A
    `UserError` names what is wrong, in one line: unknown or renamed settings, values of the wrong
    type, and whatever `config_errors` finds."""
    layers = [layer for path in files for layer in _read_with_bases(Path(path))]
    config = _merge([*layers, _read_overrides(overrides)], old_names=False)
    if errors := config_errors(config):
        raise UserError("; ".join(errors))
    return config


def read_saved_config(path: str | Path) -> Config:
    """Read the config.yaml that a run has saved, also one of an older version of this code. Nothing
    is checked but names and types: what it names (a checkpoint to start from, a tracker) need not
    be here any more. `UserError` if the file cannot be read."""
    (layer,) = _read_with_bases(Path(path))
    return _merge([layer], old_names=True)


def to_yaml(config: Config) -> str:
    """Every setting, also those at their defaults."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def flat(tree: dict, prefix: str = "") -> dict:
    """Turn nested dictionaries into one: {"a": {"b": 1}} becomes {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, part in tree.items() for k, v in flat(part, f"{prefix}{name}.").items()}


def _read_with_bases(path: Path, followed: tuple[Path, ...] = ()) -> list[DictConfig]:
    """The settings of a file, after those of the file that its `base:` names, relative to it."""
    if not path.is_file():
        raise UserError(f"no config at {path}: configs/ holds those that come with the repository")
    if path.resolve() in followed:
        raise UserError(f"{path} is its own base: remove one `base:`")
    try:
        own = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except OSError:  # omegaconf's answer to a file that is a single number
        own = None
    if not isinstance(own, DictConfig):
        raise UserError(f"{path} is no config: it must hold sections of settings, as configs/ do")
    base = own.pop("base", None)
    return [
        *(_read_with_bases(path.parent / base, (*followed, path.resolve())) if base else ()),
        own,
    ]


def _read_overrides(overrides: Sequence[str]) -> DictConfig:
    for word in overrides:
        if word.startswith("-"):
            raise UserError(f"'{word}' is no flag of this program, and is no override: write "
                            "key=value, e.g. run.steps=1000; see --help")  # fmt: skip
        if "=" not in word:
            raise UserError(f"'{word}' is no override: write key=value, e.g. run.steps=1000")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException):
        raise UserError(f"config: cannot read one of {' '.join(overrides)} as YAML") from None


def _merge(layers: Sequence[DictConfig], old_names: bool) -> Config:
    """Merge settings over the defaults; `UserError` for an unknown name or a wrong type."""
    for layer in layers:
        for old, new in RENAMED.items():
            _rename(layer, old, new, old_names)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), *layers))
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        if isinstance(error, ConfigKeyError) and "Did you mean" not in message:
            names = [f.name for f in fields(Config)] + [name for name, *_ in all_settings(Config())]
            near = get_close_matches(str(error.full_key), names, n=1, cutoff=0.5)
            message += f". Did you mean: '{near[0]}'?" if near else ""
        if "is not a subclass of" in message:
            message = "a section of settings, not a value, is expected here"
        place = f" (at {error.full_key})" if error.full_key else ""
        raise UserError(f"config: {message}{place}") from None


def _rename(layer: DictConfig, old: str, new: str, old_names: bool) -> None:
    """Give a setting its new name, if it is there."""
    value = OmegaConf.select(layer, old)
    if value is None:
        return
    if OmegaConf.select(layer, new) is not None:
        raise UserError(f"config: {old} is the old name of {new}, which is given too: remove one")
    if old == FLAG and not isinstance(value, bool):
        raise UserError(f"config: {old}={value}: use the weight {new} instead of the flag")
    if old != FLAG and not old_names:
        raise UserError(f"config: {old} is now called {new}: rename it")
    section, key = old.rsplit(".", 1)
    del OmegaConf.select(layer, section)[key]
    OmegaConf.update(layer, new, float(value) if old == FLAG else value)
