"""The keys of `hydra/sweeper=optuna`. Hydra reads this at every start, so Optuna is not imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qlora.errors import did_you_mean, require

SAMPLERS = ("tpe", "random", "grid", "cmaes")
PRUNERS = ("none", "median", "hyperband")
DIRECTIONS = ("minimize", "maximize")


@dataclass(kw_only=True)
class SearchSettings:
    """A search by Optuna; see docs/sweeps.md."""

    _target_: str = "hydra_plugins.qlora_sweep.OptunaSweeper"
    params: dict[str, str] = field(default_factory=dict)
    """What to search: a key and its values, as the command line writes them, e.g. `choice(8,16,64)` or
    `tag(log,interval(1e-5,1e-3))`. The command line's own come before them."""
    conditions: dict[str, str] = field(default_factory=dict)
    """Searched keys that are tried under a condition only: the key and an override such as `lora=loraplus`."""
    n_trials: int | None = None
    """How many trials the study shall hold, finished and pruned ones; unset: 20, or all points of a grid."""
    sampler: str = "tpe"
    """`tpe`, `random`, `grid` (every point once) or `cmaes`."""
    sampler_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of Optuna's sampler, e.g. `n_startup_trials` or `multivariate`."""
    seed: int = 0
    """The seed of the sampler."""
    objectives: list[str] = field(default_factory=list)
    """Metrics to search by, several for a front of best compromises; empty: the config's `objective`."""
    direction: Any = None
    """`minimize` or `maximize`, or a list with one for each objective; unset: as the metric's name tells."""
    pruner: str = "none"
    """`median` or `hyperband` end a training early that falls behind at `trainer.eval_steps`; `none`."""
    pruner_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of Optuna's pruner, e.g. `n_startup_trials`, `n_warmup_steps` or `reduction_factor`."""
    storage: str | None = None
    """SQLAlchemy's URL of the database that keeps the study; unset: `study.db` in the sweep's folder."""
    max_failures: int = 5
    """So many trials of one command may fail; one more ends the search."""
    batch_size: int = 1
    """Trials that other launchers than `processes` get at a time."""

    def check(self) -> None:
        """Raises `ConfigError` for a value that is never possible."""
        trials = self.n_trials
        require(trials is None or trials > 0, "hydra.sweeper.n_trials", "be positive or null", trials)
        require(0 <= self.seed < 2**31, "hydra.sweeper.seed", "lie between 0 and 2147483647", self.seed)
        require(self.max_failures >= 0, "hydra.sweeper.max_failures", "not be negative", self.max_failures)
        require(self.batch_size > 0, "hydra.sweeper.batch_size", "be positive", self.batch_size)
        for key, names in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
            name = getattr(self, key)
            near = did_you_mean(str(name), names)
            require(name in names, f"hydra.sweeper.{key}", f"be one of {', '.join(names)}", name, near.strip(" ()"))
        for direction in self.directions or []:
            require(direction in DIRECTIONS, "hydra.sweeper.direction", f"be {' or '.join(DIRECTIONS)}", direction)

    @property
    def directions(self) -> list[Any] | None:
        """`direction` as a list; None: unset."""
        return self.direction if isinstance(self.direction, list) or self.direction is None else [self.direction]
