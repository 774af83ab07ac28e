"""Import of a folder that `export --format pipeline` wrote as a run folder. No code of the folder is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import DataConfig, DiffusionConfig, ModelConfig, RunConfig, SampleConfig
from dit_in_dit.config.samplers import SAMPLERS
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.diffusion.schedulers import scheduler_option, shift_of
from dit_in_dit.interop.diffusers_files import PIPELINE_INDEX, read_diffusers_json
from dit_in_dit.interop.pipeline import DiTInDiTPipeline
from dit_in_dit.runs import atomic
from dit_in_dit.runs.checkpoint import save
from dit_in_dit.runs.folder import create_run


def is_pipeline(folder: Path) -> bool:
    """Whether the folder holds a pipeline of this package."""
    index = folder / PIPELINE_INDEX
    return index.is_file() and DiTInDiTPipeline.__name__ in str(read_diffusers_json(index).get("_class_name"))


def import_pipeline(source: Path, out: Path) -> None:
    """Write the run `out`, complete or not at all: weights, class names and sampling. The training is unknown.

    Raises:
        UserError: the folder is damaged, or no sampler of this package has its scheduler.
    """
    try:
        pipe = DiTInDiTPipeline.from_pretrained(source, low_cpu_mem_usage=False)
        path = DiffusionConfig.from_dict(pipe.transformer.config.diffusion)
        model = ModelConfig.from_dict(pipe.transformer.config.model)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:  # diffusers raises many kinds
        raise UserError(f"cannot read the pipeline {truncate(source, 60)}: {truncate(error, 90)}") from None
    scheduler = type(pipe.scheduler).__name__
    sampler = next((name for name, each in SAMPLERS.items() if each.schedulers.get(path.path) == scheduler), None)
    if sampler is None:
        raise UserError(f"{truncate(source, 60)} has the scheduler {scheduler}: set one of a sampler of this package")
    spacing = scheduler_option(pipe.scheduler, "timestep_spacing") if path.path == "ddpm" else None
    how = SampleConfig.from_dict({**(pipe.config.sample or {}), "sampler": sampler, "spacing": spacing})
    if path.path == "flow" and (shift := shift_of(pipe.scheduler)) != 1:
        how = replace(how, time_shift=shift)
    data = DataConfig(source=str(source), vae=str((source / "vae").resolve()) if pipe.vae is not None else None)
    train = TrainConfig() if pipe.config.null_class else replace(TrainConfig(), label_drop=0)
    if "internal_guidance" in (pipe.config.sample or {}):  # the weak head was trained, with an unknown weight
        train = replace(train, terms=replace(train.terms, internal=0.5))
    config = RunConfig(model=model, diffusion=path, data=data, train=train, sample=how)
    classes = tuple((pipe.config.id2label or {}).values()) or ("0",)
    with atomic.folder(out) as beside:
        create_run(beside, config)
        save(beside, config, 0, {}, pipe.transformer.nested.state_dict(), classes)
