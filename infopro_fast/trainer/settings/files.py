"""Settings from a file: a run's config.json, or JSON, YAML or TOML of the user's."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from infopro_fast.errors import ConfigError

from . import fields, recipes
from .config import TrainConfig

EITHER = "epochs and iterations: each says how long to train: expected one of them"
OF_A_RUN = "config.json"  # the name of the file in which a run folder keeps its settings


def read(path: Path) -> TrainConfig:
    """Return the settings in a file or a run folder, for flags to complete (`TrainConfig.unchecked`).

    A run's own file has every default written out. Those that would be the same today become defaults again,
    so that lambdas follow a change of modules, for example. Its folder (out) is left out: that run stays as
    it is. Raises ConfigError naming the file, and the setting that is unknown or has a wrong value.
    """
    path = path / OF_A_RUN if path.is_dir() else path
    content = {name.replace("-", "_"): _number(name, value) for name, value in _content(path).items()}
    try:
        fields.check_names(TrainConfig, content)
        if path.name == OF_A_RUN:
            return _without_defaults(TrainConfig(**{**content, "out": None}))
        if {"epochs", "iterations"} <= content.keys():
            raise ConfigError(EITHER)
        if content.get("recipe") is not None:
            content = {**recipes.settings_beside(content["recipe"], content), **content}
        return TrainConfig.unchecked(**content)
    except ConfigError as error:
        raise ConfigError(f"config {path}: {error}") from error


def _content(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        if path.suffix == ".json":
            content = json.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            try:
                content = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(error) from error
        elif path.suffix == ".toml":
            if sys.version_info < (3, 11):
                raise ConfigError(f"config {path}: TOML needs Python 3.11: write YAML or JSON")
            import tomllib

            content = tomllib.loads(text)
        else:
            raise ConfigError(f"config {path}: expected a file that ends in .json, .yaml, .yml or .toml")
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from error
    except ValueError as error:  # of every parser
        raise ConfigError(f"config {path}: not {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"config {path}: expected settings by name, got {type(content).__name__}")
    return content


def _number(name: str, value: Any) -> Any:
    """Return a text like 1e-3 as a number, where the setting is one; YAML 1.1 takes it for text."""
    field = fields.of(TrainConfig).get(name.replace("-", "_"))
    if isinstance(value, str) and field is not None and float in field.kinds:
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _without_defaults(config: TrainConfig) -> TrainConfig:
    """Return settings that resolve to the same ones, with as many as possible at their default."""
    if config.iterations is not None:  # the epochs follow from these
        config = dataclasses.replace(config, epochs=None)
    whole, found = config.resolved(), config
    for name, field in fields.of(TrainConfig).items():
        if getattr(found, name) != field.default:
            try:
                shorter = dataclasses.replace(found, **{name: field.default})
                found = shorter if shorter.resolved() == whole else found
            except ConfigError:
                pass
    return found
