"""The choices of a search, by Optuna's TPE sampler (Bergstra et al., 2011)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna

    from dit_in_dit.study.plan import StudyConfig


def suggest_changes(study: StudyConfig, trials: optuna.Study, trial: optuna.Trial) -> None:
    """Let the sampler choose the config keys of a trial; choices of an earlier try are kept.

    The trial's number seeds the sampler. If a sampler kept its state instead, it would make the same choices in every
    worker, and would repeat its choices when the study is resumed.
    """
    from optuna.samplers import TPESampler

    trials.sampler = TPESampler(seed=(study.seeds[0] + trial.number) % 2**32, constant_liar=True)
    for name, values in study.search.items():
        if isinstance(values, list):
            trial.suggest_categorical(name, values)
            continue
        spacing = {option: values[option] for option in ("step", "log") if option in values}
        if isinstance(values["low"], int) and isinstance(values["high"], int):
            trial.suggest_int(name, values["low"], values["high"], **spacing)
        else:
            trial.suggest_float(name, values["low"], values["high"], **spacing)
