"""YAML files and `key=value` overrides merged into a checked `Config`; saved and compared again on resume."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from dino_dist.augment_presets import AUGMENT_PRESETS
from dino_dist.config import MAY_CHANGE_ON_RESUME, Config, leaves
from dino_dist.config_checks import check
from dino_dist.errors import UserError

_Source = tuple[str, DictConfig]
"""Where settings come from, for messages, and the settings."""


def recipe_path(name: str) -> Path:
    """The file of a CONFIG argument: a path, or the name of a recipe that ships with the project."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():  # a folder may have a recipe's name
        if not path.is_file():
            raise UserError(f"config file {name!r} does not exist; recipes that ship: {', '.join(recipe_names())}")
        return path
    for folder in _recipe_folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    near = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
    hint = f" did you mean {near[0]}?" if near else ""
    raise UserError(f"no config file or recipe {name!r};{hint} recipes that ship: {', '.join(recipe_names())}")


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the project."""
    return sorted({path.stem for folder in _recipe_folders() for path in folder.glob("*.yaml")})


def _recipe_folders() -> list[Path]:
    """A wheel carries the recipes inside the package; a checkout has them at its top."""
    package = Path(__file__).parent
    return [folder for folder in (package / "recipes", package.parent / "configs") if folder.is_dir()]


def load_config(name: str | None, overrides: Sequence[str] = ()) -> Config:
    """Merge schema <- recipe or file <- overrides, check it; `UserError` names the key and what is allowed.

    An `augment.preset` replaces what comes before it: one in the file the schema's values, one among the overrides the
    file's too. What stands beside it, in any order, replaces the preset's values.
    """
    file: list[_Source] = []
    if name is not None:
        path = recipe_path(name)
        file = [(str(path), _read_yaml(path))]
    given = [(text if text.isprintable() else repr(text), _read_override(text)) for text in overrides]
    merged: Any = OmegaConf.structured(Config)
    for _, source in (*file, *given):
        _refuse_resolvers(source)
    for origin, source in [*_preset(file), *file, *_preset(given), *given]:
        try:
            merged = OmegaConf.merge(merged, source)
        except ConfigKeyError as error:
            raise UserError(_unknown_key(_first_key_below(source, str(error.full_key or error.key)))) from None
        except (OmegaConfBaseException, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{origin}: {_one_line(error)}") from None
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    check(config)
    return config


def _preset(sources: list[_Source]) -> list[_Source]:
    """The values of the preset that one of `sources` names, if one does; an unknown one is refused where it stands."""
    plain = [OmegaConf.to_container(source, resolve=False) for _, source in sources]
    sections = [
        section for each in plain if isinstance(each, dict) and isinstance(section := each.get("augment"), dict)
    ]
    known = [name for section in sections if (name := str(section.get("preset"))) in AUGMENT_PRESETS]
    return [(known[-1], OmegaConf.create({"augment": dict(AUGMENT_PRESETS[known[-1]])}))] if known else []


def to_plain(config: Config) -> dict[str, Any]:
    """Nested dictionaries, lists, numbers and strings; what JSON and YAML hold."""
    plain: dict[str, Any] = {}
    for key, value, _ in leaves(config):
        section, name = key.split(".")
        plain.setdefault(section, {})[name] = list(value) if isinstance(value, tuple) else value
    return plain


def to_yaml(config: Config) -> str:
    """The resolved config as a file that `load_config` reads back equal."""
    return yaml.safe_dump(to_plain(config), sort_keys=False)


def differences(saved: dict[str, Any], config: Config) -> tuple[list[str], list[str]]:
    """How `config` departs from a saved one: (changes that would change the result, changes that may be made)."""
    refused: list[str] = []
    allowed: list[str] = []
    for key, value, _ in leaves(config):
        section, name = key.split(".")
        now = list(value) if isinstance(value, tuple) else value
        before = saved.get(section, {}).get(name, "absent")
        if json.dumps(before) != json.dumps(now):
            kept = allowed if key.startswith(MAY_CHANGE_ON_RESUME) else refused
            kept.append(f"{key}: {before} -> {now}")
    return refused, allowed


def _read_yaml(path: Path) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8")
        container = yaml.safe_load(text)
        loaded = OmegaConf.create(container or {})
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {_one_line(error)}") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"config file {path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"config file {path} must hold sections such as `train:` with keys below, not a bare value")
    return loaded


def _read_override(text: str) -> DictConfig:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{text!r} is not an override: write key=value, for example train.batch_size=64")
    try:
        node: Any = yaml.safe_load(value) if value else None
        for part in reversed(key.strip().split(".")):
            node = {part: node}
        override: DictConfig = OmegaConf.create(node)
        return override
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"cannot read the value of override {text!r}: {_one_line(error)}") from None


def _refuse_resolvers(source: DictConfig) -> None:
    for text in _strings(OmegaConf.to_container(source, resolve=False)):
        if "${" in text:
            raise UserError(f"{text!r}: ${{...}} is not expanded in configs; write the value itself")


def _strings(node: Any) -> Iterable[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _strings(key)
            yield from _strings(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _strings(value)
    elif isinstance(node, str):
        yield node


def _first_key_below(source: DictConfig, key: str) -> str:
    """`section.field` for a misspelt section, whose field tells what was meant."""
    below = OmegaConf.to_container(source, resolve=False)
    below = below.get(key) if isinstance(below, dict) else None
    return f"{key}.{next(iter(below))}" if isinstance(below, dict) and below else key


def _unknown_key(key: str) -> str:
    known = [name for name, _, _ in leaves(Config())]
    last_part = {name.split(".")[1]: name for name in reversed(known)}
    near = [last_part[key]] if key in last_part else difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near = near or [last_part[name] for name in difflib.get_close_matches(key.split(".")[-1], last_part, n=1)]
    hint = (
        f"did you mean {near[0]}?"
        if near
        else f"sections are {', '.join(dict.fromkeys(k.split('.')[0] for k in known))}"
    )
    return f"unknown setting {key!r}: {hint}"


def _one_line(error: BaseException) -> str:
    first = str(error).strip().split("\n")[0]
    return first or type(error).__name__
