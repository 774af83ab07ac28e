"""A run's folder for the name of any trained model: what `load`, `sample` and train.init take."""

from __future__ import annotations

from os.path import exists
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dit_in_dit.config.averages import average_name
from dit_in_dit.config.errors import UserError, did_you_mean, truncate
from dit_in_dit.interop.hub import fetch_repo, is_repo_id
from dit_in_dit.runs.checkpoint import newest
from dit_in_dit.runs.pretrained import find_run, pretrained_models
from dit_in_dit.sampling.guide import Guide


def resolve_run(name: str, scratch: Path, *, heads: int | None = None) -> Path:
    """The folder of a pretrained model or of a run, or a run made in `scratch` from other weights. No code is run.

    Args:
        name: a pretrained model, a run, a folder that `export` wrote or of diffusers' DiT, a file of the official DiT
            or SiT, or a repository USER/NAME of the Hub that holds one of these.
        heads: number of attention heads, if neither the weights nor the published sizes give it.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    folder = fetch_repo(name) if is_repo_id(name) else find_run(name)
    if not exists(folder):  # False for a name that is too long, or has a NUL
        hint = did_you_mean(name, pretrained_models())
        raise UserError(
            f"no run at {truncate(name, 60)}, and no pretrained model or Hub id (USER/NAME) of that name{hint}"
        )
    if (folder / "config.yaml").is_file():
        return folder
    from dit_in_dit.interop import import_pipeline, import_run  # import diffusers

    out = scratch / folder.resolve().stem
    if import_pipeline.is_pipeline(folder):
        import_pipeline.import_pipeline(folder, out)
    else:
        import_run.import_run(folder, out, heads=heads)
    return out


def open_guide(name: str, device: torch.device, *, average: str | None = None) -> Guide:
    """The weak model of autoguidance: any model that `resolve_run` takes, or RUN@STEP, an older checkpoint of a run,
    with the `average` of its weights (`0.9996`, `length=0.1`; None: its first). UserError if there is none."""
    run, _, step = name.rpartition("@")
    if not (run and step.isdecimal() and exists(find_run(run))):
        run, step = name, ""
    with TemporaryDirectory() as scratch:
        saved = newest(resolve_run(run, Path(scratch)), step=int(step) if step else None)
        averaged = True if average is None else average_name(saved.config.train.decays[0], average)
        net = saved.model(device, averaged=averaged)
    return Guide(name, net, saved.config, saved.classes, saved.sha256(averaged=averaged))
