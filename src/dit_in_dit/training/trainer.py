"""State of a run in training (weights, their average, optimizer moments) and the optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import DiffusionConfig, RunConfig
from dit_in_dit.data.augment import check_reads_labels, styles_of, training_labels
from dit_in_dit.data.run_data import qualified_name
from dit_in_dit.data.source import Source
from dit_in_dit.diffusion.objective import Objective, Predict
from dit_in_dit.model.compiled import compile_blocks, explain_failures
from dit_in_dit.model.nested import NestedDiT, part_of
from dit_in_dit.model.route import Route
from dit_in_dit.runtime.memory import keep_freed_memory
from dit_in_dit.training import optimizer as optimizers
from dit_in_dit.training.batches import Batch, Packed, Unpacker, held_out_batch, principal_patches
from dit_in_dit.training.distributed import Process, check_process_count, data_parallel
from dit_in_dit.training.divergence import Divergence
from dit_in_dit.training.dropout import dropout_keys
from dit_in_dit.training.ema import Averages, Ema
from dit_in_dit.training.graphs import Graphed
from dit_in_dit.training.held_out import HELD_OUT_IMAGES, denoising_errors
from dit_in_dit.training.optimizer import Groups, learning_rate
from dit_in_dit.training.routing import Routing
from dit_in_dit.training.sharding import (
    GatheredTensors,
    local_part,
    replicate_like,
    shard,
    shard_like,
    shard_terms,
    sharding_mesh,
)
from dit_in_dit.training.term import Pass
from dit_in_dit.training.terms import LossTerms, WithTerms
from dit_in_dit.training.tree import PairwiseSum
from dit_in_dit.training.warm_start import is_inner, warm_start


class Trainer:
    """State of a run in training, and its optimizer step, in one of the processes of `world`.

    With train.parallel=ddp every process holds all weights; with fsdp it holds a part of the weights, of their average
    and of the moments. With train.reduction=fixed the bits do not depend on the number of processes.
    """

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        device: torch.device,
        world: Process | None = None,
        *,
        fresh: bool = True,
        model: NestedDiT | None = None,
        make_optimizer: Callable[[Groups], Optimizer] | None = None,
        make_loss: Callable[[DiffusionConfig], Objective] | None = None,
        fall_back: bool = False,
    ) -> None:
        """
        Args:
            fresh: false if weights will be restored; train.init is then not read.
            model: replaces the config's model, and keeps its weights.
            make_optimizer: function of parameter groups that replaces train.optimizer. Groups have `params` and
                `scale`; every step sets their `lr`.
            make_loss: class of the objective, in place of `Objective`.
            fall_back: train without compilation if blocks do not compile.
        """
        self.config, self.source, self.device, self.world = config, source, device, world or Process()
        check_process_count(train := config.train, self.world.size)
        keep_freed_memory()
        self.model = _new_model(config, model)
        self.begun = None
        if train.init and fresh:
            self.begun = warm_start(self.model, Path(train.init), train.init_blocks, source.classes, source.digest)
        self._find_subspace(fresh)
        self.model.to(device)
        self.ema, self.terms = Ema(self.model, train.decays[0]), LossTerms(config, self.model, source).to(device)
        self.sharded = self.world.size > 1 and train.parallel == "fsdp"
        keeps = self.sharded and model is not None and self.world.is_main
        self.unsharded = _whole_copy(self.model) if keeps else None  # for sampling, if the model was given to train()
        self.net = self._distribute(fall_back)
        self.averages = Averages(self.model, train)
        self.weights = dict([*self.model.named_parameters(), *self.terms.named_parameters("terms")])
        self.tree = PairwiseSum(self.weights.values()) if train.reduction == "fixed" else None
        make = make_optimizer or partial(optimizers.configured, train, self.model)
        self.optimizer: Any = make(self._groups())
        optimizers.check_optimizer(self.optimizer, self.weights.values())
        self.objective = (make_loss or Objective)(config.diffusion)
        own = {"model": model, "optimizer": make_optimizer and self.optimizer, "loss": make_loss and self.objective}
        self.objects = {name: qualified_name(thing) for name, thing in own.items() if thing is not None}
        self.backward = Graphed(self._backward, self.weights.values()) if train.compile == "graphs" else self._backward
        self.step, self.unpack, self.divergence = 0, Unpacker(config.seed, device), Divergence()
        self.each = torch.zeros(0)  # losses of the last step's examples of all processes, in order
        few = HELD_OUT_IMAGES if train.evaluate_every and source.held_out_size else 0
        self.held_out = held_out_batch(source, config.model, few) if few else None

    def _find_subspace(self, fresh: bool) -> None:
        """Compute the subspace of a split prediction from the training images, unless the model has one or gets one."""
        split = getattr(self.model, "split", None)
        if fresh and split is not None and not split.basis.any():
            find = partial(principal_patches, self.source, self.config.model, len(split.basis))
            split.basis.copy_(self.world.on_main(find))

    def _distribute(self, fall_back: bool) -> nn.Module:
        """Compile the model and its average, shard them in place, or wrap the model in DDP; returns the module to
        train."""
        train, self.routing = self.config.train, Routing(self.config, self.model)
        if train.compile in (True, "graphs"):
            by_length = self.routing.drop is not None
            compile_blocks(self.model, self.ema.model, fall_back=fall_back, by_length=by_length)
        if self.sharded:
            mesh = sharding_mesh(self.world.size, train.shard, self.device, train.timeout)
            shard(self.model, mesh, bfloat16=train.precision == "bfloat16")
            shard(self.ema.model, mesh)
            shard_terms(self.terms, mesh)
        elif self.world.size > 1 and train.reduction == "fast":
            return data_parallel(WithTerms(self.model, self.terms) if self.terms else self.model, self.device)
        return self.model

    def _groups(self) -> Groups:
        """Trained parameters of each level, with the factor on the level's learning rate."""
        scale = self.config.train.lr_scale
        trained = {name: weight for name, weight in self.weights.items() if weight.requires_grad}
        if scale.outer == scale.inner:
            return [{"params": list(trained.values()), "scale": scale.outer}]
        groups: Groups = [{"params": [], "scale": factor} for factor in (scale.outer, scale.inner)]
        for name, weight in trained.items():
            groups[is_inner(name)]["params"].append(weight)
        return [group for group in groups if group["params"]]

    def autocast(self) -> torch.autocast:
        """Autocast to bfloat16 if train.precision=bfloat16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bfloat16")

    def _accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Exchange gradients between processes only after the last micro-batch."""
        if self.sharded:
            for module in (self.net, *self.terms.values()):
                if any(True for _ in module.parameters()):
                    module.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif isinstance(self.net, DistributedDataParallel) and not last:
            return self.net.no_sync()
        return nullcontext()

    def update(self, batches: Sequence[Batch | Packed]) -> dict[str, Tensor | float]:
        """Take one optimizer step on this process's micro-batches. If loss or gradient is not finite, the step counts,
        but weights and moments stay unchanged."""
        train, losses = self.config.train, []
        rate = learning_rate(train, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        # DDP averages over processes, the tree sums the micro-batches of all.
        count = len(batches) * (self.world.size if self.tree else 1)
        for number, batch in enumerate(batches, 1):
            x, noise, t, y, image, example, features = self.unpack(batch)
            style = styles_of(self.source, image)
            with self._accumulating(last=number == len(batches)), explain_failures():
                losses.append(self.backward(count, x, noise, t, y, style, example, features))
            if self.tree:
                self.tree.take()
        if self.tree:
            self.tree.finish(self.world)
        gathered = self.world.gather(torch.stack(losses))  # processes, micro-batches, 1 + terms, N
        # fast: a process has rows of every micro-batch; fixed: a process has whole micro-batches.
        self.each, *others = (gathered if self.tree else gathered.transpose(0, 1)).movedim(2, 0).flatten(1)
        loss = self.each.mean()
        terms = {f"loss.{name}": values.mean() for name, values in zip(self.terms, others, strict=True)}
        norm, parts = self.gradient_norms()
        self._descend(norm, loss.isfinite() & norm.isfinite())
        self.optimizer.zero_grad(set_to_none=not isinstance(self.backward, Graphed))
        self.step += 1
        self.ema.update(self.model, self.step)
        self.averages.update(self.model, self.step)
        return {"loss": loss, "grad_norm": norm, "learning_rate": rate, **terms, **parts}

    def _backward(self, count: int, *parts: Tensor) -> Tensor:
        """Losses and terms (1 + terms, N) of a micro-batch of N examples, one of `count`; the gradients of their sum
        are added to those of the weights."""
        x, noise, t, y, style, example, features = parts
        route, labels = self.routing(self.step, example), training_labels(self.config, example, style)
        with self.autocast(), self.terms.recorded(self.model) as outputs:
            each = self.objective.loss(self._network(example, route, labels), x, noise, t, y)
            beside = self.objective, self.ema.model, self.sharded, features, route, labels
            given = Pass(x, noise, t, y, example, outputs, *beside)
            total, alone = self.terms.add_to(each, given)
        (total.mean() / count).backward()  # type: ignore[no-untyped-call]
        return alone

    def _network(self, example: Tensor, route: Route | None, labels: Tensor | None) -> Predict:
        """The network with what depends on these examples (route, dropout, labels) as a function of x, t and y. A model
        of one's own may take none of it."""
        options: dict[str, Any] = {} if route is None else {"route": route}
        if self.config.train.dropout:
            blocks = sum(self.config.model.blocks(level) for level in ("outer", "inner"))
            options["keys"] = dropout_keys(self.config.seed, example, blocks)
        if labels is not None:
            options["augment"] = labels
        return partial(self.net, **options) if options else self.net

    def _descend(self, norm: Tensor, finite: Tensor) -> None:
        """Clip the gradients and step the optimizer if they are finite."""
        gradients = [local_part(weight.grad) for weight in self.weights.values() if weight.grad is not None]
        if self.config.train.clip:
            torch._foreach_mul_(gradients, (self.config.train.clip / (norm + 1e-6)).clamp(max=1.0))
        if optimizers.is_fused(self.optimizer):  # `finite` stays on the device, so that the CPU does not wait for it
            weight = next(iter(self.weights.values()))
            self.optimizer.grad_scale, self.optimizer.found_inf = None, replicate_like((~finite).float(), weight)
            self.optimizer.step()
        elif finite:
            self.optimizer.step()

    def gradient_norms(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient norm before clipping: of the whole model and of each part."""
        gradients = {name: local_part(weight.grad) for name, weight in self.weights.items() if weight.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(gradients.values())))
        if self.sharded:
            copies = self.world.size // (self.config.train.shard or self.world.size)
            norms = (self.world.total(norms.square()) / copies).sqrt()  # one sum for all: the same bits in each copy
        parts: dict[str, list[Tensor]] = {}
        for name, norm in zip(gradients, norms.unbind(), strict=True):
            parts.setdefault(f"grad_norm.{part_of(name)}", []).append(norm)
        return norms.norm(), {part: torch.stack(own).norm() for part, own in parts.items()}

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Held-out denoising error of the averaged model by time: whole image and high frequencies."""
        assert self.held_out is not None
        most = self.config.train.batch_size
        return denoising_errors(self.objective, self.ema.model, self.held_out, most, self.device, self.world)

    @torch.no_grad()
    def averaged(self) -> NestedDiT | None:
        """The averaged model for sampling. If the model is sharded: an unsharded copy on rank 0, None on other ranks;
        all processes must call."""
        if not self.sharded:
            return self.ema.model
        model = None
        if self.world.is_main:
            model = self.unsharded or NestedDiT(self.config.model).eval().requires_grad_(False)
            model.to(self.device)
        weights = model.state_dict() if model is not None else {}
        for name, tensor in self.averaged_state().items():
            if name in weights:
                weights[name].copy_(tensor)
        return model

    def state(self) -> GatheredTensors:
        """Tensors from which the run can resume: weights and optimizer state by parameter name, and counters."""
        tensors = self._trained() | optimizers.state_of(self.optimizer, self.weights.items())
        return GatheredTensors(tensors | self.divergence.tensors())

    def _trained(self) -> dict[str, Tensor]:
        """Weights of the model and of loss terms, and the averages beside the first, by their names in a checkpoint."""
        weights = self.model.state_dict(prefix="model.") | self.terms.state_dict(prefix="terms.")
        return {**weights, **self.averages.tensors()}

    def averaged_state(self) -> GatheredTensors:
        """The averaged weights."""
        return GatheredTensors(self.ema.model.state_dict())

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], ema: Mapping[str, Tensor], step: int) -> None:
        """Continue from a saved state and average; tensors are copied. UserError if the state has only weights, as in
        an imported run."""
        if not optimizers.is_trained(state):
            raise UserError("imported weights have no optimizer state to resume: sample, evaluate or export them")
        for tensors, saved in ((self._trained(), state), (self.ema.model.state_dict(), ema)):
            for name, tensor in tensors.items():
                local_part(tensor).copy_(local_part(shard_like(saved[name], tensor)))
        optimizers.restore_state(self.optimizer, self.weights.items(), state)
        self.step, self.divergence = step, Divergence.read(state)


def _whole_copy(model: NestedDiT) -> NestedDiT:
    return copy.deepcopy(model).cpu().eval().requires_grad_(False)


def _new_model(config: RunConfig, given: NestedDiT | None) -> NestedDiT:
    """The given model, or the config's, with initial weights from the CPU: they are the same on every device."""
    if given is not None and config.train.dropout:
        raise UserError("train.dropout needs the config's model, not one that is given to train(): set it to 0")
    if given is not None:
        check_reads_labels(config, given)
        return given
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return NestedDiT(config.model, recompute=config.train.recompute, dropout=config.train.dropout)
