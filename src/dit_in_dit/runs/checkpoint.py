"""A run is a folder; this reads and writes it.

    config.yaml            everything the run is
    log.jsonl              one line per step and per held-out evaluation, a function of the config
    timing.jsonl           what the clock said
    checkpoints/0001200/   state.safetensors, ema.safetensors, manifest.json
    samples/0001200.png
    lock                   who trains it, while somebody does

A checkpoint's folder has its name once it is whole, on the disk, and read again. `0001200.part` is on its way in or
out; `0001200.old` is as good as any, about to be replaced by another of its step.

Nothing that is loaded can run code: YAML (safe), JSON and safetensors.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dit_in_dit import __version__
from dit_in_dit.runs import atomic, lock, integrity
from dit_in_dit.config.run import HASH_VERSION, RunConfig, config_hash, from_file, to_yaml
from dit_in_dit.config import plugins
from dit_in_dit.config.errors import PluginWarning, UserError
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs.integrity import Damage, DamagedError, DamagedWarning, read_manifest, verify

STATE, AVERAGED = "state.safetensors", "ema.safetensors"
LEFT = re.compile(r"\d{7,}\.part|\d+(\.old)?\.gone\.part")  # what a killed save leaves
KEEP = 2  # newest checkpoints that stay, of those that verify
DTYPES = {  # as safetensors names them, in the order in which it writes them
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "mount it to be written",
    errno.EACCES: "make it writable",
}


def create(run: Path, config: RunConfig) -> None:
    """Make the run's folder with its config; UserError when a run is there already or it cannot be written."""
    if (run / "config.yaml").exists():
        raise UserError(f"{run} already holds a run: continue it with --resume, or choose another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
        atomic.write(run / "config.yaml", to_yaml(config, meanings=True))
        integrity.sync(run)
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error.strerror or error}") from None


@contextmanager
def hold(run: Path) -> Iterator[None]:
    """Keep other processes, and other callers in this one, from training the run.

    Raises:
        BusyError: another has it; named with its machine.
    """
    with lock.hold(run / "lock", f"{run} is being trained"):
        clear(run)
        yield


def read_config(run: Path) -> RunConfig:
    """The run's config; UserError when there is no run."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"no run at {run}: it has no config.yaml")
    try:
        return from_file(path)
    except UserError as error:
        if missing := plugins.missing(_noted(run)):
            raise UserError(f"{run} was made with a plug-in: pass {missing} ({error})") from None
        raise


def _noted(run: Path) -> dict[str, Any]:
    """The manifest of the newest checkpoint that has one; empty where none has."""
    for folder in _folders(run):
        with suppress(DamagedError):
            return read_manifest(folder)
    return {}


class SaveError(UserError):
    """A checkpoint could not be written; those before it are as they were, and a later save may well succeed."""


class Found(NamedTuple):
    """The newest good checkpoint: its folder, its manifest, and what is wrong with those that are newer."""

    folder: Path
    manifest: dict[str, Any]
    passed_over: tuple[Damage, ...]


# ------------------------------------------------------------------------------------------ writing


def order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors as they follow each other in a file: by type, then by name."""
    rank, described = {dtype: number for number, dtype in enumerate(DTYPES)}, _described(tensors)
    return sorted(described, key=lambda name: (rank[described[name].dtype], name))


def _described(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of the same types and shapes that cost nothing to read, where reading a tensor means gathering it."""
    found: Mapping[str, Tensor] = getattr(tensors, "tensors", tensors)
    return found


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, a tensor at a time: byte for byte what `safetensors.torch.save` makes.

    Written here because that function holds all tensors a second time, and its sibling for files says neither what it
    wrote nor, in one word, what went wrong.
    """
    names, described = order(tensors), _described(tensors)
    header, end = {}, 0
    for name in names:
        tensor, start = described[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors lie aligned
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@cache
def _versions() -> dict[str, str]:
    # A source tree that is not installed has no metadata.
    return {"dit-in-dit": __version__, **{name: version(name) for name in ("torch", "numpy", "safetensors")}}


def save(
    run: Path,
    config: RunConfig,
    step: int,
    state: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    classes: tuple[str, ...],
    *,
    steady: bool = True,
    data: Mapping[str, str] | None = None,
    objects: Mapping[str, str] | None = None,
) -> Path:
    """Write the checkpoint of `step`, then drop those that are neither milestones nor among the newest `KEEP`.

    One that is not steady was made because somebody stopped the run: no run that diverges goes back to it. `data` is
    the digest and the place of the images, as `data.run_data.record` gives them; `objects` the classes of a
    model or optimizer that was given to train().

    Written beside, files and folder synced, the manifest last, read again, and renamed: at every moment a checkpoint's
    folder is whole or not there, and there are `KEEP` good ones once there were. `state` and `ema` are all that changes
    in a run: the average has no counter of its own, it goes by the step.

    Raises:
        SaveError: the disk did not take it. No part of it is left, and older checkpoints are as they were.
    """
    folder = run / "checkpoints"
    target, beside = folder / f"{step:07d}", folder / f"{step:07d}.part"
    files = {name: _safetensors(tensors) for name, tensors in ((STATE, state), (AVERAGED, ema))}
    try:
        clear(run)
        folder.mkdir(parents=True, exist_ok=True)
        integrity.sync(run)
        beside.mkdir()
        written = {name: integrity.write(beside / name, content) for name, content in files.items()}
        manifest = {
            "step": step,
            "config": config_hash(config),
            "hash_version": HASH_VERSION,
            "classes": list(classes),
            "steady": steady,
            **({"data": dict(data)} if data else {}),
            **({"objects": dict(objects)} if objects else {}),
            "versions": _versions(),
            **({"plugins": plugins.noted()} if plugins.noted() else {}),
            "bytes": {name: size for name, (size, _) in written.items()},
            "sha256": {name: sha256 for name, (_, sha256) in written.items()},
        }
        integrity.write(beside / "manifest.json", [integrity.seal(manifest)])
        integrity.sync(beside)
        verify(beside)
        _make_way(target)
        beside.rename(target)
        integrity.sync(folder)
    except (OSError, DamagedError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        what = "it reads otherwise than it was written"
        remedy = "check the disk"
        if isinstance(error, OSError):
            what, remedy = error.strerror or str(error), REMEDIES.get(error.errno or 0, remedy)
        raise SaveError(f"cannot save {target}: {what}; older checkpoints are as they were: {remedy}") from error
    finally:
        for content in files.values():  # where the disk refused, other processes still wait to give their parts
            deque(content, maxlen=0)
    with suppress(OSError):  # what cannot be deleted is no reason to stop: the next save tries again
        _prune(run, manifest, config.train.keep_every)
    return target


def _make_way(target: Path) -> None:
    """Take the checkpoint of the same step away, if there is one: a good one to a name by which it is still found."""
    aside = target.with_name(f"{target.name}.old")
    if _good(target):
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier save that was killed here
        target.rename(aside)
    elif target.exists():
        _drop(target)


def _drop(folder: Path) -> None:
    """Delete a checkpoint; killed on the way, it leaves no folder that looks like one."""
    leaving = folder.with_name(f"{folder.name}.gone.part")
    folder.rename(leaving)
    shutil.rmtree(leaving)


def _prune(run: Path, saved: Mapping[str, Any], keep_every: int) -> None:
    """Drop what is older than the newest `KEEP` that verify, but milestones, and the newest steady one, to which a run
    may go back. `saved`, a manifest, was verified just now.

    A damaged one among these is not counted, and stays until it is older than they are.
    """
    good: set[int] = set()
    steady = False
    for folder in _folders(run):
        step = _step(folder)
        milestone = step not in good and keep_every and step % keep_every == 0
        if step not in good and (len(good) < KEEP or not steady):
            manifest = saved if step == saved["step"] else _good(folder)
            if manifest is None:
                continue
            if len(good) < KEEP or manifest["steady"]:
                good.add(step)
                steady |= manifest["steady"]
                continue
        if not milestone:
            with suppress(OSError):  # the others may well go
                _drop(folder)


def clear(run: Path) -> None:
    """Delete what a killed save left. Only for who trains the run."""
    for folder in (run / "checkpoints").glob("*.part"):
        if LEFT.fullmatch(folder.name):  # else it is the user's
            shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------ reading


def _step(folder: Path) -> int:
    return int(folder.name.partition(".")[0])


def _folders(run: Path) -> list[Path]:
    """Checkpoint folders, newest step first; one that is being replaced after its replacement."""
    found = []
    for path in (run / "checkpoints").glob("*"):
        name = path.name.removesuffix(".old")
        if name.isascii() and name.isdigit():
            found.append(path)
    return sorted(found, key=lambda path: (-_step(path), path.suffix))


def has_any(run: Path) -> bool:
    """Whether the run has written a checkpoint, good or not."""
    return bool(_folders(run))


def _good(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint that verifies."""
    try:
        return verify(checkpoint)
    except DamagedError:
        return None


def newest(run: Path, *, steady: bool = False) -> Found:
    """The newest checkpoint that verifies (and is steady), and what is wrong with newer ones.

    Whoever loads a run's weights asks here for them, so that they meet no other config than their own.

    Raises:
        UserError: there is none, or config.yaml has other values than when it was written.
    """
    passed_over: list[Damage] = []
    for folder in _folders(run):
        try:
            manifest = verify(folder)
            if manifest["steady"] or not steady:
                _check_config(run, folder, manifest)
                for name in plugins.changed(manifest):
                    warnings.warn(f"{name} is not as it was when {folder} was written", PluginWarning, stacklevel=2)
                return Found(folder, manifest, tuple(passed_over))
        except DamagedError as error:
            passed_over += error.damages
    if passed_over:
        raise UserError(
            f"no checkpoint of {run} is good: {passed_over[0]}; put a copy back, or remove "
            f"{run / 'checkpoints'} to begin again"
        )
    raise UserError(f"{run} has no checkpoint yet: train it first")


def noted_data(run: Path) -> dict[str, str] | None:
    """The digest and the place of the data that the run's newest checkpoint notes; None where none does."""
    noted: dict[str, str] | None = _noted(run).get("data")
    return noted


def _check_config(run: Path, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """UserError when a run's config is not the one that a checkpoint of it was written with."""
    if manifest["config"] == config_hash(read_config(run)):
        return
    if manifest.get("hash_version", 1) > HASH_VERSION:
        raise UserError(f"{checkpoint} was written by a later version of dit-in-dit: use that version or a newer one")
    raise UserError(
        f"{run / 'config.yaml'} was changed since {checkpoint.name} was written: put it back, or begin a new run with "
        "--config"
    )


def warn(passed_over: Iterable[Damage]) -> None:
    """Say which damaged checkpoints were passed over, as Python's warnings: a library prints nothing."""
    for damage in passed_over:
        warnings.warn(f"passed over: {damage}", DamagedWarning, stacklevel=3)


class Stored(Mapping[str, Tensor]):
    """The tensors of one file of a checkpoint, each read when it is asked for: no process holds the whole file."""

    def __init__(self, path: Path) -> None:
        try:
            self.path, self._file = path, safe_open(path, "pt")
            self._names = tuple(self._file.keys())  # type: ignore[no-untyped-call]
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {path}: {error}") from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_state(checkpoint: Path, file: str = STATE) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint."""
    try:
        return load_file(checkpoint / file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {checkpoint / file}: {error}") from None


def load_trained(checkpoint: Path) -> Stored:
    """The state that training goes on from; UserError where a run was exported with its averaged weights alone."""
    state = Stored(checkpoint / STATE)
    if not any(name.startswith("model.") for name in state):
        raise UserError(
            f"{checkpoint} holds averaged weights alone: sample or evaluate them, or begin a new run with --init"
        )
    return state


def check_weights(weights: Mapping[str, Tensor], what: str) -> None:
    """UserError when weights that are to be given away or taken in are not finite."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{name[:80]} of {what} holds NaN or infinity: use an earlier checkpoint")


def check_model(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """UserError when a checkpoint's weights are those of a model that was given to train(): the config builds
    another."""
    if model := manifest.get("objects", {}).get("model"):
        raise UserError(f"{checkpoint} holds weights of a model given to train(), {model}: load {AVERAGED} into it")


def load_model(run: Path, device: torch.device, *, ema: bool = True) -> tuple[NestedDiT, RunConfig, dict[str, Any]]:
    """The run's model from its newest good checkpoint (averaged weights unless `ema` is false), its config
    and the checkpoint's manifest. Of damaged newer ones it warns (DamagedWarning)."""
    config = read_config(run)
    folder, manifest, passed_over = newest(run)
    warn(passed_over)
    check_model(folder, manifest)
    model = NestedDiT(config.model)
    if ema:
        weights = load_state(folder, AVERAGED)
    else:
        state = load_trained(folder)  # optimizer's moments, twice the weights, are not read
        weights = {name.removeprefix("model."): state[name] for name in state if name.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"{folder} does not fit {run / 'config.yaml'}: the model was changed since") from None
    return model.to(device).eval(), config, manifest
