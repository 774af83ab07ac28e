"""The training loop, a generator of facts: the caller decides what to show, draw or stop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from dit_in_dit import checkpoint
from dit_in_dit.config import RunConfig, TrainConfig, UserError, config_hash, first_difference
from dit_in_dit.data.source import Source, open_source
from dit_in_dit.diffusion.objective import EVALUATION_TIMES, Objective
from dit_in_dit.memory import keep_freed_memory
from dit_in_dit.model.nested import NestedDiT, part_of
from dit_in_dit.sealed import Damage
from dit_in_dit.training.ema import Ema
from dit_in_dit.training.example import Batch, Examples, held_out, load

FLUSH_SECONDS = 0.5  # losses stay on the device this long before they are read and logged: no wait per step
HELD_OUT_IMAGES = 512  # at most, in a held-out evaluation


@dataclass(frozen=True)
class Fact:
    """Something that happened.

    kind: start (what runs on what, the damaged checkpoints passed over), step (loss, gradient norm in all and in each
    part, learning rate), held_out (denoising error by time), checkpoint (its path), samples (due: draw with `model`,
    the averaged one).
    """

    kind: str
    step: int
    values: dict[str, Any] = field(default_factory=dict)
    model: NestedDiT | None = None


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or the best there is; UserError when it is not there."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    there = [kind for kind, count in counts.items() if count]
    kind, _, number = (there[0] if name == "auto" else name).partition(":")
    if kind not in there or (number and not (number.isascii() and number.isdecimal() and int(number) < counts[kind])):
        raise UserError(f"device {name!r} is not available here: choose from {', '.join(there)}")
    return torch.device(f"{kind}:{number}" if number else kind)


def _bfloat16_is_native(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def settled(config: RunConfig, device: torch.device) -> RunConfig:
    """The config with train.precision=auto made what it is on this device."""
    if config.train.precision != "auto":
        return config
    precision: Literal["bfloat16", "float32"] = "bfloat16" if _bfloat16_is_native(device) else "float32"
    return replace(config, train=replace(config.train, precision=precision))


def learning_rate(train: TrainConfig, step: int) -> float:
    """The rate of optimizer step `step` (from 0): a function of the step alone."""
    if step < train.warmup:
        return train.learning_rate * (step + 1) / train.warmup
    if train.schedule == "constant":
        return train.learning_rate
    progress = (step - train.warmup) / max(1, train.steps - train.warmup)
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _open_lines(path: Path) -> tuple[BinaryIO, list[dict[str, Any]]]:
    """A file of JSON lines, open to append, and the lines it holds; half a line of a killed process is cut off."""
    whole = path.read_bytes() if path.exists() else b""
    whole = whole[: whole.rfind(b"\n") + 1]
    try:
        lines = [dict(json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError):
        raise UserError(f"{path} holds a line that is not a JSON object: mend it, or start another run") from None
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(len(whole))
    file.seek(len(whole))
    return file, lines


class _Log:
    """Append-only JSON lines; a resumed run does not write again what is there already."""

    def __init__(self, path: Path) -> None:
        self.file, lines = _open_lines(path)
        self.done = {self._name(line) for line in lines}

    @staticmethod
    def _name(line: dict[str, Any]) -> tuple[int | None, bool]:
        return line.get("step"), "held_out" in line

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def write(self, line: dict[str, Any]) -> None:
        """Append, unless it is there."""
        if self._name(line) not in self.done:
            self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()


class _Clock:
    """Training time, appended to a file of JSON lines: seconds spent in steps, over all resumes, and speed."""

    def __init__(self, path: Path) -> None:
        self.file, lines = _open_lines(path)
        self.seconds = max((line.get("seconds", 0.0) for line in lines), default=0.0)
        self.start()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def start(self) -> None:
        """Time from here."""
        self.began = time.perf_counter()

    def waited(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def write(self, step: int, images: int) -> float:
        """Note the time since the start, and return images per second."""
        speed = images / self.waited()
        self.seconds += self.waited()
        line = {"step": step, "seconds": self.seconds, "images_per_second": speed}
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        return speed


class Trainer:
    """Everything that changes while a run trains."""

    def __init__(self, config: RunConfig, source: Source, device: torch.device) -> None:
        self.config, self.source, self.device = config, source, device
        keep_freed_memory()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # the initial weights are drawn on the CPU: the same on every device
            self.model = NestedDiT(config.model, recompute=config.train.recompute)
        self.model.to(device)
        self.weights = dict(self.model.named_parameters())
        self.ema = Ema(self.model, config.train.ema)
        self.fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.train.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=config.train.weight_decay,
            fused=self.fused,
        )
        self.objective = Objective(config.diffusion)
        self.predict = torch.compile(self.model) if config.train.compile else self.model
        self.step = 0
        wanted = config.train.evaluate_every and source.held_out_size
        self.held_out = held_out(source, config.model.num_classes, HELD_OUT_IMAGES) if wanted else None

    def autocast(self) -> torch.autocast:
        """bfloat16 where the config says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bfloat16")

    def update(self, batches: list[Batch]) -> dict[str, Tensor | float]:
        """One optimizer step on `accumulate` micro-batches."""
        train = self.config.train
        rate = learning_rate(train, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        for batch in batches:
            x, noise, t, y, _ = (part.to(self.device, non_blocking=True) for part in batch)
            with self.autocast():
                loss = self.objective.loss(self.predict, x, noise, t, y).mean() / len(batches)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        norm, parts = self.gradient_norms()
        nn.utils.clip_grads_with_norm_(self.weights.values(), train.clip or math.inf, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.ema.update(self.model, self.step)
        return {"loss": total, "grad_norm": norm, "learning_rate": rate, **parts}

    def gradient_norms(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient's norm before clipping, as a whole and in each part of the model."""
        gradients = {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}
        norms = torch._foreach_norm(list(gradients.values()))
        parts: dict[str, list[Tensor]] = {}
        for name, norm in zip(gradients, norms, strict=True):
            parts.setdefault(f"grad_norm.{part_of(name)}", []).append(norm)
        return torch.stack(norms).norm(), {part: torch.stack(norms).norm() for part, norms in parts.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, dict[str, float]]:
        """Held-out denoising error of the averaged model by time: whole image and high frequencies."""
        assert self.held_out is not None
        errors = {}
        x, noise, _, y, _ = self.held_out
        size = self.config.train.batch_size
        for t in EVALUATION_TIMES:
            sums = torch.zeros(2, dtype=torch.float64)
            for start in range(0, len(x), size):
                images, noises, labels = (v[start : start + size].to(self.device) for v in (x, noise, y))
                parts = self.objective.denoising_error(self.ema.model, images, noises, t, labels)
                sums += torch.stack(parts).cpu().double().sum(1)  # on the CPU: not every device has float64
            whole, high = (sums / len(x)).tolist()
            errors[str(t)] = {"whole": whole, "high": high}
        return errors

    def state(self) -> dict[str, Tensor]:
        """Tensors that continue the run: weights and optimizer moments by parameter name."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def restore(self, state: dict[str, Tensor], ema: dict[str, Tensor], step: int) -> None:
        """Continue from what `state` gave; copies, so that nothing aliases the tensors it is given."""
        weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        self.model.load_state_dict(weights)
        self.ema.model.load_state_dict(ema)
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {
                "step": state[f"optimizer.step.{name}"].to(self.device if self.fused else "cpu", copy=True),
                "exp_avg": state[f"optimizer.exp_avg.{name}"].to(self.device, copy=True),
                "exp_avg_sq": state[f"optimizer.exp_avg_sq.{name}"].to(self.device, copy=True),
            }
        self.step = step


def train(config: RunConfig, out: str | Path, *, resume: bool = False, device: str = "auto") -> Iterator[Fact]:
    """Train into the folder `out`, yielding facts; with `resume`, continue the run that is there.

    Raises:
        UserError: the data or the folder cannot be used, the config is not the resumed run's, another process
            trains it, or the loss is not finite.
    """
    run, place = Path(out), pick_device(device)
    config = settled(config, place)
    source = open_source(config.data, config.model)
    trainer = Trainer(config, source, place)
    if not resume:
        checkpoint.create(run, config)
    stored = checkpoint.read_config(run)  # first: where no run is, there is nothing to hold
    passed_over: tuple[Damage, ...] = ()
    with checkpoint.hold(run):
        if resume:
            passed_over = _resume(trainer, run, stored)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        values = {"device": str(place), "precision": config.train.precision, "parameters": parameters}
        values["passed_over"] = [str(damage) for damage in passed_over]
        yield Fact("start", trainer.step, {**values, "classes": source.classes, "skipped": source.skipped})
        yield from _loop(trainer, run)


def _resume(trainer: Trainer, run: Path, stored: RunConfig) -> tuple[Damage, ...]:
    """Bring the trainer to the run's newest good checkpoint, if it has one yet; what is wrong with newer ones."""
    if differing := first_difference(stored, trainer.config):
        raise UserError(
            f"{run} was started with another config: {differing}; resume it as it was, or use another --out"
        )
    if not checkpoint.has_any(run):
        return ()
    folder, manifest, passed_over = checkpoint.newest(run)
    if manifest["config"] != config_hash(stored):
        raise UserError(f"{run / 'config.yaml'} was changed since {folder.name} was written: put it back")
    if tuple(manifest["classes"]) != tuple(trainer.source.classes):
        raise UserError(f"{trainer.config.data.source} has other classes than when {run} was started")
    state = checkpoint.load_state(folder)
    trainer.restore(state, checkpoint.load_state(folder, "ema.safetensors"), manifest["step"])
    return passed_over


def _loop(trainer: Trainer, run: Path) -> Iterator[Fact]:
    config, train = trainer.config, trainer.config.train
    first, last = trainer.step * train.accumulate, train.steps * train.accumulate
    examples, on_cuda = Examples(trainer.source, config), trainer.device.type == "cuda"
    batches = iter(load(examples, first, last, config.data.workers, pin=on_cuda))
    pending: list[tuple[int, dict[str, Tensor | float]]] = []
    with closing(_Log(run / "log.jsonl")) as log, closing(_Clock(run / "timing.jsonl")) as clock:
        while trainer.step < train.steps:
            values = trainer.update([_whole(next(batches)) for _ in range(train.accumulate)])
            step = trainer.step
            pending.append((step, values))
            evaluate = _due(train.evaluate_every, step, train.steps) and trainer.held_out is not None
            save, draw = (_due(every, step, train.steps) for every in (train.checkpoint_every, train.sample_every))
            if evaluate or save or draw or clock.waited() > FLUSH_SECONDS:
                facts = list(_read(pending))
                speed = clock.write(step, len(pending) * config.global_batch)
                pending.clear()
                for fact in facts:
                    log.write({"step": fact.step, **fact.values})
                    yield replace(fact, values={**fact.values, "images_per_second": speed})
            if evaluate:
                errors = trainer.evaluate()
                log.write({"step": step, "held_out": errors})
                yield Fact("held_out", step, errors)
            if draw:
                yield Fact("samples", step, model=trainer.ema.model)
            if save:
                state, ema = trainer.state(), trainer.ema.model.state_dict()
                folder = checkpoint.save(run, config, step, state, ema, trainer.source.classes)
                yield Fact("checkpoint", step, {"path": str(folder)})
            if not pending:
                clock.start()  # only training is timed


def _whole(batch: Batch | str) -> Batch:
    """The batch, or the UserError that a worker met: raised there, it would arrive as a traceback's text."""
    if isinstance(batch, str):
        raise UserError(batch)
    return batch


def _due(every: int, step: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def _read(pending: list[tuple[int, dict[str, Tensor | float]]]) -> Iterator[Fact]:
    """Step facts from values still on the device; UserError at the first that is not finite."""
    for step, values in pending:
        numbers = {name: float(value) for name, value in values.items()}
        if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
            raise UserError(
                f"step {step}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}: training diverged; "
                "lower train.learning_rate, lengthen train.warmup or set train.precision=float32"
            )
        yield Fact("step", step, numbers)
