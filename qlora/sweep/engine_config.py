"""The keys of the engines: `hydra/sweeper=optuna`, `hydra/launcher=slurm`, `hydra/launcher=ray`.

Hydra reads this at every start, so no engine is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from qlora.errors import ConfigError, did_you_mean, require

SAMPLERS = ("tpe", "random", "grid", "cmaes")
PRUNERS = ("none", "median", "hyperband")
DIRECTIONS = ("minimize", "maximize")


@dataclass(kw_only=True)
class SearchSettings:
    """A search by Optuna; see docs/sweeps.md."""

    _target_: str = "hydra_plugins.qlora_sweep.OptunaSweeper"
    params: dict[str, str] = field(default_factory=dict)
    """What to search: a key and its values, as the command line writes them, e.g. `choice(8,16,64)` or
    `tag(log,interval(1e-5,1e-3))`. Those of the command line take precedence."""
    conditions: dict[str, str] = field(default_factory=dict)
    """Searched keys that are tried only under a condition: the key and an override such as `lora=loraplus`."""
    n_trials: int | None = None
    """How many finished and pruned trials the study holds at the end; unset: 20, or all points of a grid."""
    sampler: str = "tpe"
    """`tpe`, `random`, `grid` (every point once) or `cmaes`."""
    sampler_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of Optuna's sampler, e.g. `n_startup_trials` or `multivariate`."""
    seed: int = 0
    """The seed of the sampler."""
    objectives: list[str] = field(default_factory=list)
    """Metrics to optimize; several give a front of best compromises; empty: the config's `objective`."""
    direction: Any = None
    """`minimize` or `maximize`, or a list with one for each objective; unset: as the metric's name implies."""
    pruner: str = "none"
    """`median` or `hyperband` end a run early that falls behind at `trainer.eval_steps`; `none`."""
    pruner_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of Optuna's pruner, e.g. `n_startup_trials`, `n_warmup_steps` or `reduction_factor`."""
    storage: str | None = None
    """SQLAlchemy's URL of the database that keeps the study; unset: `study.db` in the sweep's folder."""
    max_failures: int = 5
    """How many trials of one command may fail; one more ends the search."""
    batch_size: int = 1
    """Trials that are queued or run at a time on a cluster; launchers of other projects get such batches."""

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


@dataclass(kw_only=True)
class SlurmSettings:
    """Jobs on a SLURM cluster; see docs/clusters.md."""

    _target_: str = "hydra_plugins.qlora_sweep.SlurmLauncher"
    partition: str | None = None
    """The partition; unset: the cluster's default."""
    account: str | None = None
    """The account that pays; unset: the user's default."""
    qos: str | None = None
    """The quality of service; unset: the default of the account."""
    constraint: str | None = None
    """Features that a node must have, e.g. `a100` or `'a100|h100'`."""
    exclude: str | None = None
    """Nodes that get no job, e.g. `node[01-04]`."""
    gpus_per_node: int | None = 1
    """GPUs of a job, which runs on one node; null: SLURM is asked for none."""
    gres: str | None = None
    """Generic resources in SLURM's words, e.g. `gpu:a100:1`; with it `gpus_per_node` is not asked for."""
    cpus_per_task: int | None = 8
    """CPUs of a job; null: the cluster's default."""
    mem_gb: int | None = None
    """Main memory of a job in GB; unset: the cluster's default."""
    timeout_min: int = 1440
    """Minutes after which SLURM ends a job."""
    signal_delay_s: int = 120
    """Seconds before this limit at which a job is warned: it saves a checkpoint, and is queued again."""
    max_num_timeout: int = 3
    """How often a job that runs out of time is queued again."""
    array_parallelism: int = 16
    """Jobs that run at a time."""
    name: str | None = None
    """What SLURM calls the jobs; unset: the name of the sweep's folder."""
    comment: str | None = None
    """SLURM's comment on the jobs."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that run on the node before a job, e.g. `[module load cuda]`."""
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    """Further options of `sbatch`, e.g. `{reservation: mine, mail-type: END}`; `true` is an option without a value."""

    def check(self) -> None:
        """Raises `ConfigError` for a value that is never possible."""
        for key in ("timeout_min", "array_parallelism"):
            require(getattr(self, key) > 0, f"hydra.launcher.{key}", "be positive", getattr(self, key))
        for key in ("gpus_per_node", "signal_delay_s", "max_num_timeout"):
            require((getattr(self, key) or 0) >= 0, f"hydra.launcher.{key}", "not be negative", getattr(self, key))
        for key in ("cpus_per_task", "mem_gb"):
            value = getattr(self, key)
            require(value is None or value > 0, f"hydra.launcher.{key}", "be positive or null", value)
        require(
            self.signal_delay_s < 60 * self.timeout_min,
            "hydra.launcher.signal_delay_s",
            f"be less than the {60 * self.timeout_min} seconds of hydra.launcher.timeout_min={self.timeout_min}",
            self.signal_delay_s,
        )
        for key, value in self.additional_parameters.items():
            option = key.replace("_", "-")
            if option in SETTLED:
                raise ConfigError(
                    f"hydra.launcher.additional_parameters.{key} is settled by the sweep{SETTLED[option]}; leave it out"
                )
            plain = isinstance(value, str | int | float | bool)
            require(plain, f"hydra.launcher.additional_parameters.{key}", "be a plain value, or true", value)
        for key, text in self._texts():
            require("\n" not in text, f"hydra.launcher.{key}", "be a single line", text)

    def _texts(self) -> list[tuple[str, str]]:
        settings = [(item.name, getattr(self, item.name)) for item in fields(self)]
        further = [(f"additional_parameters.{key}", value) for key, value in self.additional_parameters.items()]
        return [(key, value) for key, value in (*settings, *further) if isinstance(value, str)]


SETTLED = {
    "array": "",
    "output": ": stdout.log in each job's folder",
    "error": ": stderr.log in each job's folder",
    "open-mode": "",
    "signal": "; hydra.launcher.signal_delay_s says when it comes",
    "requeue": "; hydra.launcher.max_num_timeout says how often",
    "no-requeue": "; hydra.launcher.max_num_timeout=0 does it",
    "time": " from hydra.launcher.timeout_min",
    "nodes": ": a job runs on one node",
    "ntasks": ": a job is one process",
    "parsable": "",
    "wait": "; sweep.detach=false waits",
    "hold": "",
    "wrap": "",
    "chdir": ": jobs run where the command was typed",
    "dependency": "",
}
"""Options of `sbatch` that the engine sets itself, and where they come from."""


@dataclass(kw_only=True)
class RayParts:
    """Arguments of Ray's own functions."""

    init: dict[str, Any] = field(default_factory=lambda: {"address": None})
    """Arguments of `ray.init`: `address=auto` joins the cluster of this machine, `address=null` starts a Ray on it."""
    remote: dict[str, Any] = field(default_factory=lambda: {"num_gpus": 1, "num_cpus": 1, "max_retries": 0})
    """Arguments of `ray.remote` that say what a job gets: `num_gpus`, `num_cpus`, `memory`, `resources` ..."""


@dataclass(kw_only=True)
class RaySettings:
    """Jobs on a Ray cluster; see docs/clusters.md."""

    _target_: str = "hydra_plugins.qlora_sweep.RayLauncher"
    ray: RayParts = field(default_factory=RayParts)

    def check(self) -> None:
        """Raises `ConfigError` for a value that is never possible."""
        for key in ("num_cpus", "num_gpus", "memory"):
            value = self.ray.remote.get(key, 0)
            rule = "be a number that is not negative"
            require(isinstance(value, int | float) and value >= 0, f"hydra.launcher.ray.remote.{key}", rule, value)
        retries = self.ray.remote.get("max_retries", 0)
        rule = "be 0: a job whose node is lost resumes when the same command is started again"
        require(retries == 0, "hydra.launcher.ray.remote.max_retries", rule, retries)
