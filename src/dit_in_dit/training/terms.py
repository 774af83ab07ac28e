"""Loss terms beside the objective's loss, each with a weight in `train.terms`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_in_dit.config.errors import UserError, truncate
from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.features import at_source
from dit_in_dit.data.source import Source
from dit_in_dit.inspection.hooks import forward_hooks
from dit_in_dit.model.nested import initialise
from dit_in_dit.runtime.seeding import generator
from dit_in_dit.training.alignment import Repa, Sra, feature_bytes
from dit_in_dit.training.internal import Internal
from dit_in_dit.training.term import Pass, Term

TERMS: dict[str, type[Term]] = {"internal": Internal, "sra": Sra, "repa": Repa}


class LossTerms(nn.ModuleDict):
    """The terms of a config whose weight is not 0, by name."""

    def __init__(self, config: RunConfig, model: nn.Module, source: Source | None = None) -> None:
        """Raises UserError if `model` lacks a module that a term reads."""
        super().__init__()
        config = at_source(config, source)
        self.factors = {name: weight for name in TERMS if (weight := getattr(config.train.terms, name))}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator(config.seed, "terms", 0).integers(2**63)))
            self.update({name: TERMS[name](config) for name in self.factors})
            initialise(self)
        known = dict(model.named_modules())
        for name, term in self.named():
            if lacking := next((module for module in term.reads() if module not in known), None):
                raise UserError(f"train.terms.{name} reads {lacking}, which the model lacks: set train.terms.{name}=0")

    def named(self) -> Iterator[tuple[str, Term]]:
        """Each term with its name."""
        yield from self.items()  # type: ignore[misc]

    def references(self) -> dict[str, str]:
        """The `reference_sha256` of each term that has one, by the term's name."""
        hashes = {name: term.reference_sha256() for name, term in self.named()}
        return {name: sha256 for name, sha256 in hashes.items() if sha256}

    @contextmanager
    def recorded(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Outputs of the modules that the terms read, of the last forward pass while the context is open: not of the
        passes that train.recompute repeats in the backward pass."""
        seen: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, arguments: Any, output: Tensor) -> None:
            seen[name] = output

        names = dict.fromkeys(name for _, term in self.named() for name in term.reads())
        hooks = [(model.get_submodule(name), partial(keep, name)) for name in names]
        with forward_hooks(hooks, compiled=True):
            yield seen

    def add_to(self, loss: Tensor, given: Pass) -> tuple[Tensor, Tensor]:
        """The weighted sum of `loss` (N,) and all terms, and `loss` and each term alone, (1 + terms, N)."""
        total, alone = loss, [loss]
        for name, term in self.named():
            alone.append(term(given))
            total = total + self.factors[name] * alone[-1]
        return total, torch.stack(alone).detach()


def check_references(now: Mapping[str, str], recorded: Mapping[str, str] | None, run: object) -> None:
    """UserError if what a term compares with is not what `run` recorded; runs of earlier versions recorded none."""
    for name in TERMS:
        if recorded and name in recorded and recorded[name] != now.get(name):
            raise UserError(
                f"train.terms.{name}: the encoder's files, or the features beside the latents, are not those of "
                f"{truncate(run, 60)} (SHA-256 {now.get(name, '')[:12]}, not {recorded[name][:12]}): put them back"
            )


class WithTerms(nn.Module):
    """A model and the terms, for DDP to exchange the gradients of both; the terms are not computed by `forward`."""

    def __init__(self, model: nn.Module, terms: LossTerms) -> None:
        super().__init__()
        self.model, self.terms = model, terms

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        out: Tensor = self.model(*inputs, **options)
        return out


def terms_cost(config: RunConfig) -> dict[str, dict[str, int]]:
    """Trained parameters of each active term, and MACs per image that it adds to a training step; for repa
    with stored features also their bytes per image."""
    active = {name: kind for name, kind in TERMS.items() if getattr(config.train.terms, name)}
    costs = {
        name: {"parameters": sum(weight.numel() for weight in kind(config).parameters()), "macs": kind.macs(config)}
        for name, kind in active.items()
    }
    if "repa" in active and (size := feature_bytes(config)):
        costs["repa"]["feature_bytes"] = size
    return costs
