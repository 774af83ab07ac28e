"""Design: the fields of a model's config, and what a config costs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dit_in_dit.config import presets
from dit_in_dit.config.choices import KEYS, choice_names
from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.files import changed_keys, replace_keys, to_yaml
from dit_in_dit.config.model import ModelConfig
from dit_in_dit.config.plugins import plugin_arguments
from dit_in_dit.config.program import Program, format_stages
from dit_in_dit.config.rules import unused_choices
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import Section, keys
from dit_in_dit.config.strict_yaml import parse_yaml
from dit_in_dit.study.match import NoTwin, count_parameters, forward_macs, match

GROUPS = {  # title of a group of fields, and the start of its keys; the first that fits has a key
    "Outer level": "model.outer.",
    "Inner level": "model.inner.",
    "Tokens beside the patches": "model.tokens.",
    "Image, patches and time": "model.",
}
LEFT_OUT = ("model.stages", "model.depth", "model.inner.depth_ratio")  # the blocks of the screen say them


@dataclass(frozen=True)
class Field:
    """A config key as a field.

    Attributes:
        choices: values of a menu; empty for a number or a text.
        kind: bool, or float and int for numbers, or str for text that YAML reads.
    """

    key: str
    meaning: str
    choices: tuple[str, ...]
    kind: type


def fields() -> list[Field]:
    """The fields of all model keys but the stages, made from the schema."""
    made = []
    for name, meaning, value in keys(ModelConfig(), "model."):
        if isinstance(value, Section) or name in LEFT_OUT or name.startswith("model.plugins"):
            continue
        made.append(Field(name, meaning, *_form(name, value)))
    return made


def _form(name: str, value: Any) -> tuple[tuple[str, ...], type]:
    """Menu and type of a key."""
    owner: Any = ModelConfig
    *groups, last = name.split(".")[1:]
    for group in groups:
        owner = get_type_hints(owner)[group]
    hint = get_type_hints(owner)[last]
    built_in = [str(part) for part in get_args(hint)] if get_origin(hint) is Literal else []
    if name in KEYS or built_in:
        optional = ["null"] if value is None else []
        return (*optional, *(choice_names(name, built_in) if name in KEYS else built_in)), str
    return (), type(value) if isinstance(value, bool | int | float) and hint in (bool, int, float) else str


def field_value(config: RunConfig, field: Field) -> Any:
    """The config's value as the field shows it."""
    value: Any = config
    for part in field.key.split("."):
        value = getattr(value, part)
    if field.kind is not str:
        return value
    return "null" if value is None else ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def designed(preset: str, program: Sequence[tuple[str, int]], values: Mapping[str, Any]) -> RunConfig:
    """The preset's config with the screen's stages and values. Raises UserError.

    Args:
        program: the stages, such as [("outer", 4), ("inner", 3)].
        values: value of each field by key; texts are read as YAML.
    """
    config, given = presets.get(preset), {field.key: field for field in fields()}
    changes: dict[str, Any] = {}
    for key, value in values.items():
        field = given[key]
        if value is None:
            raise UserError(f"{key} is empty: give a number")
        if value != field_value(config, field):
            listed = f"[{value}]" if isinstance(value, str) and "," in value else value
            read = parse_yaml(str(listed), key) if isinstance(value, str) and not field.choices else listed
            changes[key] = None if read == "null" else read
    if not program:
        raise UserError("the model has no stage: add an outer or an inner one")
    stages: Program = tuple(program)  # type: ignore[arg-type]  # the config checks the levels
    if stages != config.model.program:
        changes |= {"model.stages": format_stages(stages), "model.depth": None}
        changes |= {"model.use_inner": True} if any(level == "inner" for level, _ in stages) else {}
    return replace_keys(config, changes)


def cost_rows(config: RunConfig) -> list[tuple[str, str]]:
    """Names and values of what the model has and costs, without a forward pass."""
    model = config.model
    inner = f"{model.patches} x {model.sub_patches}" if model.blocks("inner") else "none"
    return [
        ("stages", format_stages(model.program)),
        ("outer tokens", f"{model.patches} of width {model.outer.width}"),
        ("inner tokens", inner + (f" of width {model.inner.width}" if model.blocks("inner") else "")),
        ("parameters", f"{count_parameters(model) / 1e6:,.2f} M"),
        ("MACs per image", f"{forward_macs(model) / 1e6:,.2f} M"),
    ]


def memory(config: RunConfig) -> list[tuple[str, str]]:
    """Memory of training, traced from a forward pass without numbers."""
    from dit_in_dit.inspection.trace import inspect

    kept = inspect(config.model, 1, config.train.recompute)["activation_bytes"]["total"]
    weights = 16 * count_parameters(config.model)  # weights, gradients, two moments of AdamW, in float32
    batch = config.train.batch_size
    return [
        ("weights, gradients and moments", f"{weights / 2**20:,.1f} MiB"),
        (
            "kept for the backward pass",
            f"{kept / 2**20:,.2f} MiB per image, {kept * batch / 2**30:,.2f} GiB at {batch}",
        ),
    ]


def plain_twin(config: RunConfig) -> list[tuple[str, str]]:
    """The plain DiT with the same MACs: its keys that differ, and its cost. Raises UserError."""
    if not config.model.blocks("inner"):
        return [("plain twin", "this model has no inner blocks")]
    plain = replace_keys(config, {"model.use_inner": False})
    try:
        twin = match(plain, config, "macs", tolerance=0.02)
    except NoTwin as error:
        return [("plain twin", str(error))]
    changed = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in twin.changed.items()) or "nothing else"
    return [
        ("plain twin of equal MACs", f"model.use_inner false, {changed}"),
        ("its parameters", f"{count_parameters(twin.model) / 1e6:,.2f} M"),
        ("its MACs per image", f"{forward_macs(twin.model) / 1e6:,.2f} M ({twin.gap:+.1%})"),
    ]


def without_effect(preset: str, config: RunConfig) -> list[str]:
    """Sentences on changed choices that the model's stages do not use."""
    changed = changed_keys(presets.get(preset), config)
    reasons = unused_choices(config.model)
    return [f"model.{choice} has no effect: {why}" for choice, why in reasons.items() if f"model.{choice}" in changed]


def command(preset: str, config: RunConfig, out: str = "runs/mine") -> str:
    """The command that trains the model."""
    changed = changed_keys(presets.get(preset), config)
    words = [word for key, (_, value) in changed.items() for word in ("--set", f"{key}={_text(value)}")]
    return shlex.join(["dit-in-dit", "train", "--preset", preset, *plugin_arguments(), *words, "--out", out])


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else truncate(value, 200)


def yaml_text(config: RunConfig) -> str:
    """The whole config, with the meaning of each key."""
    return to_yaml(config, meanings=True)
