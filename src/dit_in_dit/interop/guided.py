"""Guidance by a weak model in the pipeline of `diffusers`."""

from __future__ import annotations

from functools import partial
from typing import Any

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DiffusionConfig, SampleConfig
from dit_in_dit.diffusion.guidance import Pair, away_from_weak, beside
from dit_in_dit.diffusion.objective import Predict
from dit_in_dit.diffusion.path import make_path


def transformer_predict(transformer: Any, guide: Any, how: SampleConfig) -> Predict:
    """The transformer as a function of x_t, t and y, away from its weak head and the transformer `guide`, if there is
    one. UserError if the guide does not fit."""

    def call(network: Any) -> Predict:
        return lambda x, t, y: network(x, t, y, return_dict=False)[0]

    predict = call(transformer)
    if how.internal_guidance != 1:
        pair: Pair = partial(transformer, return_dict=False, weak=True)
        predict = away_from_weak(predict, pair, how.internal_guidance, how.guide_interval)
    if guide is None:
        return predict
    own, other = (DiffusionConfig.from_dict(each.config.diffusion) for each in (transformer, guide))
    model, weak = transformer.config.model, guide.config.model
    values = {key: (model[key], weak[key]) for key in ("image_size", "channels", "num_classes")}
    for key, (wanted, got) in (values | {"diffusion.path": (own.path, other.path)}).items():
        if got != wanted and (key, got) != ("num_classes", 0):  # a guide without classes guides without them
            raise UserError(f"the guide must have the model's {key}, {wanted}: got {got}")
    quantities: dict[str, Any] = {"given": other.predict, "wanted": own.predict, "classes": weak["num_classes"] > 0}
    pair = beside(predict, call(guide), make_path(own), **quantities)
    return away_from_weak(predict, pair, how.guide_scale, how.guide_interval)
