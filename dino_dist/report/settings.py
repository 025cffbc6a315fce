"""The settings of a run beside the project's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dino_dist.config import Config, leaves
from dino_dist.config_file import load_config
from dino_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting as the run has it."""

    section: str
    name: str
    value: str
    default: str | None
    """Set where the run departs from it; None: it is the default, or this version knows no such setting."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of them."""

    config: Config | None
    """None: the file is no config of this version."""
    rows: tuple[Setting, ...]
    notes: tuple[str, ...]


def read_settings(run_dir: Path) -> Settings:
    """The config in the run folder, or the one that was submitted; without either, none."""
    file = next((file for name in ("config.yaml", "submitted.yaml") if (file := run_dir / name).is_file()), None)
    if file is None:
        return Settings(config=None, rows=(), notes=("the run folder holds no config yet",))
    try:
        config = load_config(str(file))
    except UserError as error:
        return Settings(config=None, rows=_as_written(file), notes=(f"config shown without defaults: {error}",))
    defaults = {key: value for key, value, _ in leaves(Config())}
    rows = []
    for key, value, _ in leaves(config):
        section, name = key.split(".")
        differs = value != defaults[key]
        rows.append(
            Setting(section=section, name=name, value=_text(value), default=_text(defaults[key]) if differs else None)
        )
    return Settings(config=config, rows=tuple(rows), notes=())


def _as_written(file: Path) -> tuple[Setting, ...]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return ()
    rows = []
    for section, fields in content.items() if isinstance(content, Mapping) else ():
        for name, value in fields.items() if isinstance(fields, Mapping) else (("", fields),):
            rows.append(Setting(section=str(section), name=str(name), value=_text(value), default=None))
    return tuple(rows)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if value == "":
        return '""'
    if isinstance(value, tuple | list):
        return f"[{', '.join(_text(part) for part in value)}]"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
