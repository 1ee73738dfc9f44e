"""Settings from a file: a run's config.json, or JSON, YAML or TOML of the user's."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from infopro_fast.errors import ConfigError

from . import fields, recipes
from .config import TrainConfig, known

EITHER = "epochs and iterations: each says how long to train: expected one of them"


def read(path: Path) -> TrainConfig:
    """Return the settings in a file or a run folder, for flags to complete (`TrainConfig.unchecked`).

    A run's own file has every default written out. Those that would be the same today become defaults again,
    so that lambdas follow a change of modules, for example. Its folder (out) is left out: that run stays as
    it is. Raises ConfigError naming the file, and the setting that is unknown or has a wrong value.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        content = known({name.replace("-", "_"): value for name, value in _content(path).items()})
        content = {name: _number(name, value) for name, value in content.items()}
        if len(content) > len(fields.of(TrainConfig)) // 2:  # a run's
            return _without_defaults(TrainConfig(**{**content, "out": None}))
        if {"epochs", "iterations"} <= content.keys():
            raise ConfigError(EITHER)
        if content.get("recipe") is not None:
            content = {**recipes.settings_beside(content["recipe"], content), **content}
        return TrainConfig.unchecked(**content)
    except ConfigError as error:
        raise ConfigError(f"config {path}: {error}") from error


def _content(path: Path) -> dict[str, Any]:
    import yaml  # here, so that the command line starts sooner

    kind = path.suffix[1:].upper().replace("YML", "YAML")
    if kind not in ("JSON", "YAML", "TOML"):
        raise ConfigError("expected a file that ends in .json, .yaml, .yml or .toml")
    if kind == "TOML" and sys.version_info < (3, 11):
        raise ConfigError("TOML needs Python 3.11: write YAML or JSON")
    try:
        text = path.read_text()
        if kind == "TOML":
            import tomllib

            content = tomllib.loads(text)
        else:
            content = json.loads(text) if kind == "JSON" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(str(error.strerror)) from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"not {kind}: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"expected settings by name, got {type(content).__name__}")
    return content


def _number(name: str, value: Any) -> Any:
    """Return a text like 1e-3 as a number, where the setting is one; YAML 1.1 takes it for text."""
    if isinstance(value, str) and float in fields.of(TrainConfig)[name].kinds:
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _without_defaults(config: TrainConfig) -> TrainConfig:
    """Return settings that resolve to the same ones, with as many as possible at their default."""
    if config.iterations is not None:  # the epochs follow from these
        config = dataclasses.replace(config, epochs=None)
    whole, found = config.resolved(), config
    for name, field in fields.of(TrainConfig).items():
        with contextlib.suppress(ConfigError):
            shorter = dataclasses.replace(found, **{name: field.default})
            found = shorter if shorter.resolved() == whole else found
    return found
