"""The optimization: the group `trainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from qlora.config.optimizers import check_optimizer, check_schedule
from qlora.config.registries.installed import check_name
from qlora.config.registries.step_parts import GROUP
from qlora.config.schema.values import HOLDS, MAPPINGS, written
from qlora.config.training_length import read_interval
from qlora.errors import ConfigError, require
from qlora.text import parse_size

NARROW = 2560
"""The most hidden units of a model whose layers `cuda_graphs=auto` computes by graphs."""

Parallel = StrEnum("Parallel", "ddp fsdp")
"""How several processes share a training run."""

Keep = StrEnum("Keep", "auto best last average")
"""What of a training run becomes its adapter."""

FlashAttention = StrEnum("FlashAttention", "auto fa2 fa3 fa4")
"""Whose kernels attend inside rows of packs and under a sliding window."""


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """The optimization, in the names of `transformers.TrainingArguments`."""

    max_steps: int | None = MISSING
    """Optimizer steps; null to count by `num_train_epochs`. A default gives way where that is set."""
    num_train_epochs: float | None = None
    """Passes over the data; a default gives way where `max_steps` is set."""
    per_device_train_batch_size: int = MISSING
    """Rows a forward pass on each device (micro-batch)."""
    gradient_accumulation_steps: int = MISSING
    """Micro-batches an optimizer step."""
    per_device_eval_batch_size: int = 8
    """Rows a forward pass when the loss of held-out rows is measured."""
    learning_rate: float = MISSING
    """Peak learning rate."""
    lr_scheduler_type: str = "constant"
    """The learning rate schedule: `constant`, `linear`, `cosine`, `warmup_stable_decay` ..., all in docs/run.md."""
    lr_scheduler_kwargs: Any = field(default_factory=dict, metadata={HOLDS: dict[str, Any] | None})
    """Further arguments of that schedule, e.g. `{num_decay_steps: 100}`, by the table in docs/run.md; a
    `num_..._steps` below 1 is a share of all steps. `constant` reads none. Null: none, also of those that a recipe
    sets."""
    warmup_steps: float = 0
    """Steps of linear warm-up; below 1: a share of all steps (the original's `--warmup_ratio`). `constant`,
    `reduce_lr_on_plateau` and `greedy` have no warm-up."""
    optim: str = MISSING
    """The optimizer by transformers' name, e.g. `paged_adamw_32bit`, `paged_adamw_8bit`, `adamw_torch`, `muon`,
    `lorafa`; all in docs/run.md."""
    optim_args: Any = field(default_factory=dict, metadata={HOLDS: dict[str, Any] | None})
    """Further arguments of that optimizer, by the table in docs/run.md, e.g. `trainer.optim=sgd
    trainer.optim_args.momentum=0.9`. Null: none."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment."""
    adam_epsilon: float = 1e-8
    """Adam's divisor floor."""
    max_grad_norm: float = MISSING
    """Gradients are scaled down to this norm; 0: never."""
    label_smoothing_factor: float = 0.0
    """Share of each label's probability that is spread over all tokens, in the loss that is trained; the held-out loss
    is measured without."""
    neftune_noise_alpha: float | None = None
    """Noise on the embeddings while the model trains (NEFTune, arXiv 2310.05914), e.g. 5; unset: none."""
    gradient_checkpointing: bool = MISSING
    """Recompute activations in the backward pass: less memory, about a third more time. `memory_budget` decides in its
    place."""
    memory_budget: str | None = None
    """The most that a run may hold of the GPU while it trains, paged optimizer states counted in, e.g. `24GB` or
    `22GiB`, or `auto`, what the GPU has free (without CUDA: unset). As few decoder layers are recomputed as the budget
    allows: by the formula of `task=plan` first, then by what two steps needed. Where none must be, the decoded experts
    of a mixture are kept as far as memory is free. Unset: all or none of the layers are recomputed, as
    `gradient_checkpointing` says."""
    compile: Any = "auto"
    """Compile the decoder layers with `torch.compile`, one by one with shared code: true, false or `auto` (with
    CUDA)."""
    cuda_graphs: Any = "auto"
    """Compute the forward pass of checkpointed decoder layers, once they are compiled, as CUDA graphs, each of which
    the host starts with one call; they take memory for themselves, which `task=plan` counts. True, false or `auto`
    (with CUDA, for dense models of up to 2,560 hidden units: the host starts such small kernels too slowly)."""
    fused_linear: Any = "auto"
    """Compute 4-bit layers and their adapters as one operation, layers that read the same input together; they share
    one dropout mask then. True, false or `auto` (with CUDA)."""
    fused_experts: Any = "auto"
    """Compute the experts of a mixture and their adapters as two operations on the rows of each expert; an adapter's
    dropout mask is one for all experts of a token then. True, false or `auto` (with CUDA)."""
    fused_attention: Any = "auto"
    """Compute a batch as variable-length (unpadded) rows, with attention inside each row: no padding is computed.
    Of pairs of a preference loss the prompt is computed once, for both answers. True, false or `auto` (with CUDA, in
    16 bits). On a CPU `true` computes the same row by row, slowly."""
    flash_attention: FlashAttention = FlashAttention.auto
    """Whose kernels `fused_attention` uses inside rows of packs and under a sliding window: `fa2`, torch's own; `fa3`
    (the package `flash_attn_interface`, Hopper) or `fa4` (`flash-attn-4`, Hopper and Blackwell); `auto`: the first of
    these two that is installed, serves the GPU and agrees with torch's own on a small trial."""
    fused_loss: Any = "auto"
    """Compute the loss of the trained tokens alone, in chunks of logits: true, false or `auto` (with CUDA)."""
    step_parts: list[str] = field(default_factory=list)
    """Parts of the fast step that other packages add, by the names that they register (entry point group
    `qlora.step_parts`) or as `module:Class` of a package in `trusted`; docs/extending.md shows one."""
    parallel: Parallel = Parallel.ddp
    """How the processes of torchrun or accelerate share the work. `ddp`: each holds the whole base. `fsdp`: each holds
    a part of every decoder layer of the frozen base, for bases that do not fit one GPU; the adapter stays whole.
    Gradients are averaged over all tokens of a step in both."""
    context_parallel: int = 1
    """Processes that share each row, neighbours of one launch: each computes a part of its tokens and gathers the keys
    and values of all (docs/long-contexts.md). Their number must be a multiple of it; 1: no row is shared."""
    group_by_length: bool = True
    """Make batches of rows with about equal token counts, which saves padding."""
    logging_steps: int = 10
    """Steps between two log entries."""
    eval_steps: Any = field(default=None, metadata={HOLDS: int | str | None})
    """Steps between two measurements of the held-out rows, or a share of an epoch such as `0.5ep`; null: only at the
    end."""
    save_steps: Any = field(default=None, metadata={HOLDS: int | str | None})
    """Steps between two checkpoints, or a share of an epoch such as `0.5ep`; null: none before the end."""
    save_total_limit: int | None = 40
    """How many checkpoints are kept, the newest ones, beside those that `keep` needs; null: all."""
    keep: Keep = Keep.auto
    """What of a training run becomes its adapter: the `last` step; the `best` of the steps at which the held-out rows
    were measured, the last one included, by `keep_metric`; or the `average` of the last three checkpoints, exactly: an
    adapter of three times the rank, whose product B A is the mean of theirs. `auto`: `best` where rows are held out
    and measured at `eval_steps`, else `last`."""
    keep_metric: str | None = None
    """The metric that `keep` compares steps by, e.g. `eval_loss`; unset: `objective` where it is measured at
    `eval_steps`, else `eval_loss`."""
    disk_wait: float = 600
    """Seconds that a run waits for space on a full disk before it ends; 0: not at all."""
    dataloader_num_workers: int = 0
    """Processes that collate batches ahead; 0: in the training process."""
    deterministic: bool = False
    """Use only operations that give the same bits every time, also on a GPU, where they are slower. On a CPU a run
    gives the same bits anyway."""
    profile: bool = False
    """Record two of the first steps with torch's profiler: a Chrome trace in the run's folder, and the ten most
    expensive kernels on the screen."""

    def asks_for_graphs(self, hidden: int, *, is_mixture: bool) -> bool:
        """Returns whether checkpointed layers of a model `hidden` units wide are to be computed by CUDA graphs."""
        return self.cuda_graphs is True or (self.cuda_graphs == "auto" and hidden <= NARROW and not is_mixture)

    def __post_init__(self) -> None:
        for index, name in enumerate(self.step_parts):
            check_name(f"trainer.step_parts[{index}]", name, (), GROUP)
        self.eval_steps = read_interval("trainer.eval_steps", self.eval_steps)
        self.save_steps = read_interval("trainer.save_steps", self.save_steps)
        for name in ("max_steps", "num_train_epochs", "save_total_limit"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"trainer.{name}", "be positive or null", value)
        for name in (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "context_parallel",
        ):  # fmt: skip
            require(getattr(self, name) > 0, f"trainer.{name}", "be positive", getattr(self, name))
        for name in ("learning_rate", "adam_epsilon"):
            value = getattr(self, name)
            require(value > 0 and math.isfinite(value), f"trainer.{name}", "be positive", value)
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "dataloader_num_workers", "disk_wait"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"trainer.{name}", "not be negative, and be finite", value)
        noise = self.neftune_noise_alpha
        require(noise is None or 0 < noise < math.inf, "trainer.neftune_noise_alpha", "be positive or null", noise)
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            value = getattr(self, name)
            require(0 <= value < 1, f"trainer.{name}", "be at least 0 and below 1", value)
        require(self.logging_steps > 0, "trainer.logging_steps", "be positive", self.logging_steps)
        budget = self.memory_budget
        require(budget in (None, "auto") or (parse_size(str(budget)) or 0) > 0, "trainer.memory_budget",
                "be null, auto or a size such as 24GB or 22GiB", budget)  # fmt: skip
        if self.deterministic and budget is not None:
            raise ConfigError(
                "trainer.memory_budget depends on what memory is free, and cuts batches when it is short, which gives "
                "other bits; trainer.deterministic=true does not go with it: leave one of them out"
            )
        if self.deterministic and self.flash_attention not in (FlashAttention.auto, FlashAttention.fa2):
            raise ConfigError(
                f"trainer.flash_attention={self.flash_attention.value} adds up in any order, and "
                "trainer.deterministic=true takes torch's own attention: leave one of them out"
            )
        for name in ("compile", "cuda_graphs", "fused_linear", "fused_experts", "fused_attention", "fused_loss"):
            value = getattr(self, name)
            require(value == "auto" or isinstance(value, bool), f"trainer.{name}", "be true, false or auto", value)
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ConfigError(
                f"trainer.max_steps={written(self.max_steps)} and trainer.num_train_epochs="
                f"{written(self.num_train_epochs)}: set "
                "exactly one of the two and the other to null, e.g. trainer.num_train_epochs=3 trainer.max_steps=null"
            )
        for name in ("lr_scheduler_kwargs", "optim_args"):
            value = getattr(self, name)
            require(value is None or isinstance(value, dict), f"trainer.{name}",
                    f"be a mapping such as {MAPPINGS[f'trainer.{name}']} or null", value)  # fmt: skip
        self.lr_scheduler_kwargs = check_schedule(
            self.lr_scheduler_type,
            self.lr_scheduler_kwargs or {},
            learning_rate=self.learning_rate,
            measures=self.eval_steps is not None,
        )
        self.optim_args = check_optimizer(self.optim, self.optim_args or {}, self.lr_scheduler_type)
