"""Every config group as a dataclass, documented field by field; the checks that need no torch live here.

A docstring below a field is its manual: `qlora --help GROUP` prints it. Values are chosen in `conf/`; a default
stands here only where a choice has no better place. `slots=True` makes an unknown key impossible to swallow.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora.config.entry_points import installed_names
from qlora.config.optimizers import OPTIMIZERS, SCHEDULES, check_installed, check_optimizer, check_schedule
from qlora.config.trackers import NO_TRACKER, describe_unknown, tracker_path
from qlora.errors import ConfigError, did_you_mean, require
from qlora.text import parse_size

# The formats that `data/formats.py` renders; kept here so that a typo is found before torch is imported.
FORMAT_NAMES = (
    *("auto", "alpaca", "input-output", "prompt-completion", "question-answer", "messages", "conversations"),
    *("chosen", "human-bot", "inst", "guanaco", "self-instruct-tasks", "unnatural", "segments", "text"),
)
# The chat templates of `data/templates/`, by name; `auto` is the tokenizer's own.
TEMPLATE_NAMES = (
    *("auto", "alpaca", "chatml", "chatml-thoughts", "gemma", "guanaco", "llama-2", "llama-3", "mistral"),
    *("phi-3", "plain", "qwen", "vicuna", "zephyr"),
)
MAPPINGS = {"trainer.optim_args": "{momentum: 0.9}", "trainer.lr_scheduler_kwargs": "{num_decay_steps: 100}"}
"""What may stand in a mapping, where an example tells more than `{a: 1}`."""
HOLDS = "holds"
"""In a field's metadata: the type of a value that Hydra cannot express, which is then annotated `Any`."""

FUNCTION_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""The user's own function, as `module:function`."""

# Metrics that are computed from generated text; a name with a colon is the user's own `module:function`.
METRIC_NAMES = ("exact_match",)
METRIC_GROUP, CALLBACK_GROUP = "qlora.metrics", "qlora.callbacks"
"""The entry points by which an installed package adds metrics and trainer callbacks."""
CALLBACK_PACKAGES = ("qlora", "transformers")
"""The packages whose trainer callbacks a config may name; `trusted` adds the user's own."""

OWN_FUNCTIONS = (
    *("qlora.demo.instructions:train_rows", "qlora.demo.instructions:eval_rows"),
    *("qlora.demo.pretraining:training_rows", "qlora.demo.pretraining:probe_rows"),
    "qlora.data.formats.as_chat:from_alpaca",
)
"""The functions that a config may name by itself: the embedded data, and Alpaca's rows as chats."""

METRIC_LIBRARY = "evaluate"
"""In place of a module it means a metric of Hugging Face's library of this name."""

OPTIMIZER_NAMES, SCHEDULER_NAMES = tuple(OPTIMIZERS), tuple(SCHEDULES)

# The cards of `planning/cards.py`; a test compares the two.
CARD_NAMES = (
    *("t4", "v100-32gb", "rtx-3090", "rtx-4090", "rtx-5090", "a10", "l4", "a6000", "l40s", "a100-40gb", "a100-80gb"),
    *("h100", "h200"),
)

# What the watchdog counts.
WATCHDOG_COUNTS = ("nonfinite", "zero", "divergence", "slow", "stalled", "skipped", "rollbacks")


class Device(Enum):
    """Where the model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    xpu = "xpu"


class TaskName(Enum):
    """What a run does."""

    train = "train"
    evaluate = "evaluate"
    predict = "predict"
    preview = "preview"
    chat = "chat"
    merge = "merge"
    push = "push"
    report = "report"
    plan = "plan"
    doctor = "doctor"
    migrate = "migrate"
    replay = "replay"
    wandb_sweep = "wandb_sweep"


class Resume(Enum):
    """What a start does in a folder that holds a run."""

    auto = "auto"
    force = "force"
    never = "never"


class SameBase(Enum):
    """What happens where an adapter meets another base than its own."""

    auto = "auto"
    force = "force"


class Weights(Enum):
    """Where the base weights come from."""

    pretrained = "pretrained"
    random = "random"


class QuantType(Enum):
    """The 4-bit data types of bitsandbytes."""

    nf4 = "nf4"
    fp4 = "fp4"


class ComputeDtype(Enum):
    """The precision of matrix products."""

    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class BaseProducts(Enum):
    """The precision of matrix products with the frozen weights."""

    native = "native"
    fp8 = "fp8"


class LoraBias(Enum):
    """Which bias vectors are trained with the adapter."""

    none = "none"
    all = "all"
    lora_only = "lora_only"


class LoraInit(Enum):
    """How the adapter weights are drawn."""

    default = "default"
    gaussian = "gaussian"
    orthogonal = "orthogonal"
    pissa = "pissa"
    olora = "olora"
    loftq = "loftq"
    eva = "eva"


class LoraDtype(Enum):
    """What the adapter weights are stored in while they train."""

    fp32 = "fp32"
    bf16 = "bf16"


class EvaluationName(Enum):
    """What is measured."""

    rows = "rows"
    mmlu = "mmlu"
    lm_eval = "lm_eval"


class MmluSplit(Enum):
    """The questions of MMLU: 1,531 to choose a model by, or 14,042 to report."""

    val = "val"
    test = "test"


class MergeBase(Enum):
    """The weights that an adapter is added to."""

    dequantized = "dequantized"
    original = "original"


class PlanStep(Enum):
    """How a training step is computed, as far as its memory and speed depend on it."""

    auto = "auto"
    plain = "plain"
    fast = "fast"


class WandbMode(Enum):
    """Whether a run is sent to its tracker, and whether wandb talks to its server."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


class WatchdogAction(Enum):
    """What is done about something that goes wrong in a training."""

    ignore = "ignore"
    warn = "warn"
    skip = "skip"
    rollback = "rollback"
    stop = "stop"

    @property
    def keeps_out(self) -> bool:
        """Whether an update by gradients that are no numbers is undone."""
        return self not in (WatchdogAction.ignore, WatchdogAction.warn)


class Parallel(Enum):
    """How several processes share a training."""

    ddp = "ddp"
    fsdp = "fsdp"


class FlashAttention(Enum):
    """Whose kernels attend inside rows of packs and under a sliding window."""

    auto = "auto"
    fa2 = "fa2"
    fa3 = "fa3"
    fa4 = "fa4"


class SweepMethod(Enum):
    """How wandb chooses the points of a sweep of its own."""

    grid = "grid"
    random = "random"
    bayes = "bayes"


TASK_KEYS: dict[str, tuple[TaskName, ...]] = {
    "adapter": (TaskName.chat, TaskName.evaluate, TaskName.merge, TaskName.predict, TaskName.push),
    "repo": (TaskName.push,),
    "runs": (TaskName.report,),
    "run": (TaskName.replay,),
    "source": (TaskName.migrate,),
    "task.rows": (TaskName.preview,),
    "task.ids": (TaskName.preview,),
    "task.private": (TaskName.push,),
    "task.online": (TaskName.doctor,),
    "task.method": (TaskName.wandb_sweep,),
}
"""The keys that describe no training: what one task reads or writes, and how. No other task takes them."""


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """What to do with the model: train it, measure it, or let it answer."""

    name: TaskName = MISSING
    """`train`, `evaluate`, `predict`, `preview`, `chat`, `merge`, `push`, `report`, `plan`, `doctor`, `migrate`,
    `replay` or `wandb_sweep`; chosen with `task=`."""
    train: bool = True
    """Train the model (`task=train` only; the original's `--do_train`)."""
    evaluate: bool = True
    """Measure the held-out rows after training (`task=train` only; the original's `--do_eval`)."""
    predict: bool = True
    """Write predictions for a few held-out rows after training (`task=train` only; `--do_predict`)."""
    rows: int = 3
    """How many rows `task=preview` shows."""
    ids: bool = False
    """Whether `task=preview` shows token ids beside the text."""
    private: bool = True
    """Whether a repository that `task=push` creates is private."""
    online: bool = False
    """Whether `task=doctor` asks the hub and wandb if they accept the logins; else nothing goes over the network."""
    method: SweepMethod | None = None
    """How a sweep that `task=wandb-sweep` describes chooses its points: `grid`, `random` or `bayes`; unset:
    `grid` where all values are listed, else `bayes`."""

    def __post_init__(self) -> None:
        require(self.rows >= 0, "task.rows", "be 0 or more", self.rows)


@dataclass(kw_only=True, slots=True)
class ArchitectureConfig:
    """A model's shape in the names of transformers' config classes; what `model.weights=random` builds."""

    model_type: str = MISSING
    """transformers' name of the architecture, e.g. `llama`, `qwen3`, `gpt_neox`."""
    hidden_size: int = MISSING
    """Width of the residual stream."""
    intermediate_size: int = MISSING
    """Width of the feed-forward layer."""
    num_hidden_layers: int = MISSING
    """Number of decoder layers."""
    num_attention_heads: int = MISSING
    """Number of query heads."""
    num_key_value_heads: int | None = None
    """Number of key and value heads (grouped-query attention); unset: as many as query heads."""
    head_dim: int | None = None
    """Width of a head; unset: `hidden_size / num_attention_heads`."""
    vocab_size: int = MISSING
    """Rows of the embedding matrix."""
    max_position_embeddings: int = MISSING
    """Longest context, in tokens."""
    tie_word_embeddings: bool = False
    """Whether the embedding and the output layer are one matrix."""
    rms_norm_eps: float | None = None
    """Floor of the norms' divisor; unset: the model type's own."""
    rope_theta: float | None = None
    """Base of the rotary position embedding; unset: the model type's own."""
    sliding_window: int | None = None
    """Attention looks back so many tokens at most; unset: as the model type does by itself."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        optional = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "sliding_window")
        for name in (*sizes, "max_position_embeddings", *optional):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.architecture.{name}", "be positive", value)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The base model and how its files are found and placed."""

    name: str = MISSING
    """A hub id, a local folder, or `tiny` for the embedded model."""
    weights: Weights = Weights.pretrained
    """`pretrained` loads the weights; `random` draws them from `seed` in the shape of `model.architecture`, quantized
    layer by layer (pretraining, or measuring speed and memory without a download)."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    cache_dir: str | None = None
    """Folder for downloaded files; unset: the hub library's own."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository brings along; given on the command line, or as
    `QLORA_TRUSTED=model.trust_remote_code` in the environment, and in no file. The access token of gated models is
    read from the environment (`HF_TOKEN`, or `hf auth login`), never from a config."""
    tokenizer: str | None = None
    """Another tokenizer than the model's own: a hub id, a local folder, or `tiny`, the embedded one, which random
    weights have where none is named: nothing is downloaded for them."""
    device_map: str | None = None
    """How accelerate spreads the layers: `auto`, `balanced`, `sequential`; unset: everything on one device."""
    max_memory: str | None = None
    """Most memory a GPU may hold of the weights, e.g. `40GiB`, for each GPU (the original's `--max_memory_MB`)."""
    attn_implementation: str | None = None
    """`sdpa`, `eager`, `flash_attention_2` or any other name that transformers knows; unset: its choice."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens to add to the vocabulary; their embedding rows are trained and saved with the adapter. Those in angle
    brackets are special: marks of a template, which decoded answers leave out."""
    license: str | None = None
    """The licence of the weights, for the start screen and the model card."""
    gated: bool = False
    """Whether the hub asks for an accepted licence and a token."""
    architecture: ArchitectureConfig | None = None
    """The shape of the model, as its own config file states it."""

    def __post_init__(self) -> None:
        if "/" in (self.attn_implementation or "") and not self.trust_remote_code:
            raise ConfigError(
                f"model.attn_implementation={self.attn_implementation}: this is code of a hub repository; set "
                "model.trust_remote_code=true to run it, and USE_HUB_KERNELS=YES in the environment"
            )
        if self.weights is Weights.pretrained:
            return
        if self.architecture is None:
            raise ConfigError(
                f"model.weights=random needs the shape of {self.name} in model.architecture; "
                "choose a preset with model=NAME or set model.architecture.* fields"
            )
        if self.device_map or self.max_memory:
            raise ConfigError(
                "model.weights=random draws the base on one device; leave model.device_map and model.max_memory out"
            )
        self.tokenizer = self.tokenizer or "tiny"


@dataclass(kw_only=True, slots=True)
class QuantizationConfig:
    """The data type of the frozen base weights (QLoRA paper, section 3)."""

    bits: int = MISSING
    """4, 8, 16 or 32 bits a base weight."""
    quant_type: QuantType = QuantType.nf4
    """The 4-bit data type: `nf4` (normal float) or `fp4`; read with `bits=4` only."""
    double_quant: bool = False
    """Quantize the quantization constants too (saves 0.37 bits a parameter); with `bits=4` only."""
    compute_dtype: ComputeDtype = ComputeDtype.auto
    """The precision of matrix products and, with `bits=16`, of the stored weights. `auto`: bf16 where the
    device computes in it natively, else fp16 on a GPU and fp32 on a CPU (with `bits=16`: bf16 on any CPU)."""
    compute: BaseProducts = BaseProducts.native
    """The precision of training's products with the 4-bit weights: `native` is that of `compute_dtype`, `fp8` rounds
    weights, activations and gradients to 8-bit floats for them (NVIDIA Ada, Hopper and later; emulated on a CPU). The
    adapter, evaluation and generation compute as ever."""
    int8_threshold: float = 6.0
    """Activations above this stay in 16 bit (LLM.int8(), arXiv 2208.07339); read with `bits=8` only."""

    def __post_init__(self) -> None:
        require(self.bits in (4, 8, 16, 32), "quantization.bits", "be 4, 8, 16 or 32", self.bits)
        require(self.int8_threshold >= 0, "quantization.int8_threshold", "not be negative", self.int8_threshold)
        if self.double_quant and self.bits != 4:
            raise ConfigError(
                f"quantization.double_quant=true needs quantization.bits=4, got bits={self.bits}; choose "
                "quantization=int8, quantization=none or quantization=fp32, or set quantization.double_quant=false"
            )
        if self.compute is BaseProducts.fp8 and self.bits != 4:
            raise ConfigError(
                f"quantization.compute=fp8 is for 4-bit weights, got quantization.bits={self.bits}; choose "
                "quantization=nf4 or quantization=fp4, or leave it out"
            )
        if self.bits == 16 and self.compute_dtype is ComputeDtype.fp32:
            raise ConfigError(
                "quantization.compute_dtype=fp32 contradicts quantization.bits=16; use quantization=fp32 for "
                "32-bit weights, or compute_dtype=auto, bf16 or fp16"
            )


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """The adapter (LoRA, arXiv 2106.09685), in PEFT's vocabulary."""

    enabled: bool = True
    """Train an adapter; false (`lora=none`) trains all weights, with `bits` 16 or 32."""
    r: int = MISSING
    """Rank of the adapter matrices."""
    alpha: float = MISSING
    """The adapter's output is scaled by `alpha / r` (with `use_rslora`: `alpha / sqrt(r)`)."""
    dropout: float = 0.0
    """Share of the adapter's inputs that are zeroed in training."""
    bias: LoraBias = LoraBias.none
    """Which bias vectors train too: `none`, `all`, `lora_only`."""
    target_modules: Any = field(default="all-linear", metadata={HOLDS: list[str] | str})
    """`all-linear` (every linear layer but the output layer, as in the paper), or a list of module names or
    regular expressions; each must match a linear layer."""
    use_rslora: bool = False
    """Scale by `alpha / sqrt(r)` (rank-stabilized LoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA, arXiv 2402.09353)."""
    init: LoraInit = LoraInit.default
    """`default`, `gaussian`, `orthogonal`, `pissa`, `olora`, `loftq` or `eva`."""
    loraplus_lr_ratio: float | None = None
    """Learning rate of the B matrices over that of the A matrices (LoRA+, arXiv 2402.12354); unset: equal."""
    dtype: LoraDtype = LoraDtype.fp32
    """What the adapter and its gradients are stored in while it trains: `fp32`, or `bf16` as in the original script,
    which takes half of their memory; steps below about 1/256 of a weight are then lost."""

    def __post_init__(self) -> None:
        require(self.r > 0, "lora.r", "be positive", self.r, "use lora=none to train all weights")
        require(0 < self.alpha < math.inf, "lora.alpha", "be positive and finite", self.alpha)
        require(0 <= self.dropout < 1, "lora.dropout", "be at least 0 and below 1", self.dropout)
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]
        names = self.target_modules
        is_list = isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)
        require(bool(is_list), "lora.target_modules", "be 'all-linear' or a list of module names", names)
        ratio = self.loraplus_lr_ratio
        require(ratio is None or 1 <= ratio < math.inf, "lora.loraplus_lr_ratio", "be at least 1 and finite", ratio)


class TrainOn(Enum):
    """Which tokens the loss counts."""

    assistant = "assistant"
    last = "last"
    all = "all"


class OnTooLong(Enum):
    """What happens to a row that is longer than the limits."""

    truncate = "truncate"
    drop = "drop"
    error = "error"


class OnEmpty(Enum):
    """What happens to an answer without text."""

    drop = "drop"
    train = "train"
    error = "error"


@dataclass(kw_only=True, slots=True)
class MixConfig:
    """One of several data sets that are trained on together; the fields are those of `data`."""

    path: str
    """As `data.path`."""
    weight: float = 1.0
    """How often a pass over the data shows each row: 2 twice, 0.5 a random half of the rows."""
    subset: str | None = None
    """As `data.subset`."""
    split: str = "train"
    """As `data.split`."""
    revision: str | None = None
    """As `data.revision`."""
    data_files: str | None = None
    """As `data.data_files`."""
    format: str = "auto"
    """As `data.format`."""
    columns: dict[str, str] = field(default_factory=dict)
    """As `data.columns`."""
    template: str | None = None
    """As `data.template`; unset: that one."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The rows to train and measure on, and how they become tokens."""

    name: str = MISSING
    """The name of the data set in reports."""
    path: str | None = MISSING
    """A file (JSON, JSONL, CSV, TSV, Parquet, plain text, each also .gz), a folder or glob of them, a folder that
    `datasets` saved, a hub id, or `module:function` that returns an iterable of rows."""
    subset: str | None = None
    """The hub data set's configuration."""
    split: str = "train"
    """The hub data set's split to train on."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set."""
    data_files: str | None = None
    """The file inside the hub data set, where it holds several."""
    eval_path: str | None = None
    """Held-out rows of their own, in the forms of `path`; unset: those of `eval_split`, or rows split off `path`."""
    eval_split: str | None = None
    """The split of `path` that holds rows to measure on, e.g. `test`; unset: `eval_dataset_size` rows are split off."""
    mix: dict[str, Any] = field(default_factory=dict, metadata={HOLDS: dict[str, MixConfig | str]})
    """Several sets instead of one `path`, by names of your own: a path, or a mapping with `path`, `weight` (2: a pass
    shows each row twice; 0.5: a random half of the rows), `subset`, `split`, `revision`, `data_files`, `format`,
    `columns` and `template`. E.g. `data=mix data.mix.mine=a.jsonl data.mix.other.path=b.jsonl
    data.mix.other.weight=2`."""
    format: str = "auto"
    """What the columns mean: a name of the table in docs/data.md, `module:function` of your own (a row in, a row of
    another format out), or `auto` to recognise it."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns under other names: `data.columns.output=response` reads `response` where the format wants `output`."""
    reformulations: bool = False
    """Train on the reformulated instructions of unnatural-instructions too."""
    template: str = "auto"
    """How conversations are written: `auto` takes the tokenizer's chat template (or `guanaco` where it has none);
    or a name of the table in docs/data.md, or a file with a Jinja chat template."""
    train_on: TrainOn = TrainOn.assistant
    """The loss counts every `assistant` turn, the `last` one, or `all` tokens."""
    train_on_source: bool = False
    """The original's name for `train_on=all`."""
    source_max_len: int | None = 1024
    """Longest prompt in tokens, `<bos>` included; a longer one loses its beginning, never its end. Null: no limit."""
    target_max_len: int | None = 256
    """Longest answer in tokens, end token included; a cut answer keeps no end token. Null: no limit."""
    max_length: int | None = None
    """Longest row in tokens: the answer keeps at least half of it, the prompt loses its beginning. Null: no limit."""
    on_too_long: OnTooLong = OnTooLong.truncate
    """`truncate` a row that is too long, `drop` it, or stop with an `error`."""
    on_empty: OnEmpty = OnEmpty.drop
    """An answer without text (white space alone is none): `drop` leaves an empty turn of a chat without loss, and drops
    a row in which nothing else is trained; `train` trains its end token; or stop with an `error`."""
    max_train_samples: int | None = None
    """Use at most so many rows to train."""
    max_eval_samples: int | None = None
    """Use at most so many held-out rows."""
    eval_dataset_size: float = 1024
    """Rows to hold out when there is neither `eval_path` nor `eval_split`; below 1: a share of all rows."""
    split_seed: int = 42
    """Seed of that split and of the order of the rows; apart from `seed`, so that seeds compare on equal rows."""
    packing: bool = False
    """Join rows into packs of `pack_length` tokens that do not see each other: no padding, fewer steps."""
    pack_length: int | None = None
    """Tokens in a pack; unset: the longest row that the limits allow."""
    cache_dir: str | None = None
    """Where rows and tokens are kept between runs; unset: `$QLORA_CACHE`, or `~/.cache/qlora`."""
    num_proc: int | None = None
    """Processes that tokenize; unset: as many as pay for the number of rows and cores."""
    max_row_bytes: str = "64MB"
    """A row with more bytes, in its file or once it is read, stops the run; a size such as `64MB` or `1.5GiB`."""

    def __post_init__(self) -> None:
        for name in ("source_max_len", "target_max_len", "max_length", "pack_length", "num_proc"):
            value = getattr(self, name)
            require(value is None or value > 0, f"data.{name}", "be positive or null", value)
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            require(value is None or value > 0, f"data.{name}", "be positive or null", value)
        require((parse_size(self.max_row_bytes) or 0) > 0, "data.max_row_bytes", "be a size such as 64MB",
                self.max_row_bytes)  # fmt: skip
        size = self.eval_dataset_size
        require(size > 0 and (size < 1 or size == int(size)), "data.eval_dataset_size",
                "be a number of rows, or a share between 0 and 1", size)  # fmt: skip
        require(0 <= self.split_seed < 2**32, "data.split_seed", "lie between 0 and 4294967295", self.split_seed)
        if self.path is None and not self.mix:
            raise ConfigError("data.path is not set; give a file or a hub id, e.g. data=local data.path=my_rows.jsonl")
        if self.path == "vicuna":
            raise ConfigError(
                "data=vicuna: the ShareGPT conversations behind Vicuna were never released; train on a ShareGPT file "
                "of your own with data=local data.format=conversations data.path=FILE, or choose data=oasst1"
            )
        if self.mix and self.path is not None:
            raise ConfigError("data.mix and data.path are both set; name every set in data.mix (data=mix), or one path")
        if self.mix:
            self._check_mix()
        if self.eval_path is not None and self.eval_split is not None:
            raise ConfigError("data.eval_path and data.eval_split both name held-out rows; leave one of them out")
        self.mix = {name: build_mix(name, part) for name, part in self.mix.items()}
        check_format("data.format", self.format)
        check_template("data.template", self.template)
        if self.train_on_source and self.train_on is TrainOn.last:
            raise ConfigError("data.train_on_source=true means data.train_on=all, but data.train_on=last is set; "
                              "leave one of them out")  # fmt: skip
        if self.train_on_source:
            self.train_on = TrainOn.all
        if self.pack_length is not None and not self.packing:
            raise ConfigError("data.pack_length is only read with data.packing=true")
        if self.packing and self.pack_length is None and self.longest_row is None:
            raise ConfigError("data.packing=true needs a length: set data.pack_length, or data.max_length")

    def _check_mix(self) -> None:
        """Refuses what only a single set reads; held-out rows of their own read the format and the columns."""
        own: dict[str, Any] = {"subset": None, "split": "train", "revision": None, "data_files": None}
        if self.eval_path is None:
            own |= {"format": "auto", "columns": {}}
        for name, unset in own.items():
            if (value := getattr(self, name)) != unset:
                raise ConfigError(f"data.{name}={value} is not read beside data.mix, for each of its sets has its own; "
                                  f"set data.mix.NAME.{name}")  # fmt: skip

    @property
    def splits_off(self) -> bool:
        """Whether the held-out rows are split off those to train on."""
        return self.eval_path is None and self.eval_split is None

    @property
    def pack_width(self) -> int | None:
        """Tokens of a pack; None: no packing."""
        return (self.pack_length or self.longest_row) if self.packing else None

    @property
    def longest_row(self) -> int | None:
        """The most tokens that the limits leave of a row; None: no limit."""
        limits = [self.max_length] if self.max_length is not None else []
        if self.source_max_len is not None and self.target_max_len is not None:
            limits.append(self.source_max_len + self.target_max_len)
        return min(limits, default=None)


def build_mix(name: str, part: object) -> MixConfig:
    """Returns one entry of `data.mix`, which may be a path alone; raises `ConfigError` with the full key."""
    key = f"data.mix.{name}"
    if isinstance(part, MixConfig):
        return part
    values = {"path": part} if isinstance(part, str) else part
    names = [item.name for item in fields(MixConfig)]
    for field_name in values if isinstance(values, dict) else ():
        if field_name not in names:
            raise ConfigError(f"unknown key '{key}.{field_name}'{did_you_mean(str(field_name), names)}; "
                              f"an entry of data.mix has {', '.join(names)}")  # fmt: skip
    if not isinstance(values, dict) or "path" not in values:
        raise ConfigError(f"{key} needs a path: {key}=FILE, or {key}.path=FILE beside its other fields")
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(MixConfig), values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}.{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(typed, MixConfig)
    require(math.isfinite(typed.weight) and typed.weight > 0, f"{key}.weight", "be positive", typed.weight)
    check_format(f"{key}.format", typed.format)
    if typed.template is not None:
        check_template(f"{key}.template", typed.template)
    return typed


def check_format(key: str, name: str) -> None:
    """Raises `ConfigError` unless `name` is a format's, or the user's own `module:function`."""
    if name not in FORMAT_NAMES and not FUNCTION_PATH.fullmatch(name):
        raise ConfigError(
            f"{key}={name!r} is unknown{did_you_mean(name, FORMAT_NAMES)}; "
            f"choose one of {', '.join(FORMAT_NAMES)}, or module:function of your own"
        )


def check_template(key: str, name: str) -> None:
    """Raises `ConfigError` unless `name` is a template's, or looks like a file."""
    if name not in TEMPLATE_NAMES and "/" not in name and not name.endswith((".jinja", ".j2")):
        raise ConfigError(
            f"{key}={name!r} is unknown{did_you_mean(name, TEMPLATE_NAMES)}; "
            f"choose one of {', '.join(TEMPLATE_NAMES)}, or a file with a Jinja chat template (my.jinja)"
        )


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """The optimization, in the names of `transformers.TrainingArguments`."""

    max_steps: int | None = MISSING
    """Optimizer steps; null to count by `num_train_epochs`."""
    num_train_epochs: float | None = None
    """Passes over the data; needs `max_steps=null`."""
    per_device_train_batch_size: int = MISSING
    """Rows a forward pass on each device (micro-batch)."""
    gradient_accumulation_steps: int = MISSING
    """Micro-batches an optimizer step."""
    per_device_eval_batch_size: int = 8
    """Rows a forward pass when the loss of held-out rows is measured."""
    learning_rate: float = MISSING
    """Peak learning rate."""
    lr_scheduler_type: str = "constant"
    """The learning rate's course: `constant`, `linear`, `cosine`, `warmup_stable_decay` ..., all in docs/run.md."""
    lr_scheduler_kwargs: Any = field(default_factory=dict, metadata={HOLDS: dict[str, Any] | None})
    """Further arguments of that schedule, e.g. `{num_decay_steps: 100}`, by the table in docs/run.md; a
    `num_..._steps` below 1 is a share of all steps. `constant` reads none. Null: none, also of those that a recipe
    sets."""
    warmup_steps: float = 0
    """Steps of linear warm-up; below 1: a share of all steps (the original's `--warmup_ratio`). `constant`,
    `reduce_lr_on_plateau` and `greedy` have no warm-up."""
    optim: str = MISSING
    """The optimizer by transformers' name, e.g. `paged_adamw_32bit`, `paged_adamw_8bit`, `adamw_torch`; all in
    docs/run.md."""
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
    gradient_checkpointing: bool = MISSING
    """Recompute activations in the backward pass: less memory, about a third more time. `memory_budget` decides in its
    place."""
    memory_budget: str | None = None
    """The most that torch may hold of the GPU while it trains, e.g. `24GB` or `22GiB`, or `auto`, what the GPU has free
    (without CUDA: unset). As few decoder layers are recomputed as fit, by the formula of `task=plan` first and then by
    what two steps needed. Unset: all or none of them, as `gradient_checkpointing` says."""
    compile: Any = "auto"
    """Compile the decoder layers with `torch.compile`, one by one with shared code: true, false or `auto` (with
    CUDA)."""
    fused_linear: Any = "auto"
    """Compute 4-bit layers and their adapters as one operation, layers that read the same input together; they share
    one dropout mask then. True, false or `auto` (with CUDA)."""
    fused_attention: Any = "auto"
    """Lay the rows of a batch one behind the other, with attention inside each: no padding is computed between them.
    True, false or `auto` (with CUDA, in 16 bits)."""
    flash_attention: FlashAttention = FlashAttention.auto
    """Whose kernels `fused_attention` uses inside rows of packs and under a sliding window: `fa2`, torch's own; `fa3`
    (the package `flash_attn_interface`, Hopper) or `fa4` (`flash-attn-4`, Hopper and Blackwell); `auto`: the first of
    these two that is installed, serves the GPU and agrees with torch's own on a small trial."""
    fused_loss: Any = "auto"
    """Compute the loss piece by piece, without the logits of all tokens: true, false or `auto` (with CUDA)."""
    parallel: Parallel = Parallel.ddp
    """How the processes of torchrun or accelerate share the work. `ddp`: each holds the whole base. `fsdp`: each holds
    a part of every decoder layer of the frozen base, for bases that do not fit one card; the adapter stays whole.
    Gradients are averaged over all tokens of a step in both."""
    group_by_length: bool = True
    """Draw batches of rows with about equal token counts, which saves padding."""
    logging_steps: int = 10
    """Log every so many steps."""
    eval_steps: int | None = None
    """Measure the held-out loss every so many steps; null: only at the end."""
    save_steps: int | None = None
    """Write a checkpoint every so many steps; null: none before the end."""
    save_total_limit: int | None = 40
    """Keep the newest so many checkpoints; null: all."""
    disk_wait: float = 600
    """Seconds that a training waits for space where the disk is full, before it ends; 0: not at all."""
    dataloader_num_workers: int = 0
    """Processes that collate batches ahead; 0: in the training process."""
    deterministic: bool = False
    """Take operations alone that give the same bits every time, also on a GPU; slower there. On a CPU a run gives the
    same bits anyway."""
    profile: bool = False
    """Record two of the first steps with torch's profiler: a Chrome trace in the run's folder, and the ten most
    expensive kernels on the screen."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "num_train_epochs", "eval_steps", "save_steps", "save_total_limit"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"trainer.{name}", "be positive or null", value)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            require(getattr(self, name) > 0, f"trainer.{name}", "be positive", getattr(self, name))
        for name in ("learning_rate", "adam_epsilon"):
            value = getattr(self, name)
            require(value > 0 and math.isfinite(value), f"trainer.{name}", "be positive", value)
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "dataloader_num_workers", "disk_wait"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"trainer.{name}", "not be negative, and be finite", value)
        for name in ("adam_beta1", "adam_beta2"):
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
        for name in ("compile", "fused_linear", "fused_attention", "fused_loss"):
            value = getattr(self, name)
            require(value == "auto" or isinstance(value, bool), f"trainer.{name}", "be true, false or auto", value)
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ConfigError(
                f"trainer.max_steps={_written(self.max_steps)} and trainer.num_train_epochs="
                f"{_written(self.num_train_epochs)}: set "
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


@dataclass(kw_only=True, slots=True)
class WatchdogConfig:
    """What is done about things that go wrong in a training: each is named with its likely cause and counted.

    `ignore` looks away, `warn` tells it, `stop` ends the training with the last checkpoint kept, `rollback` goes back
    to the last checkpoint from before with a lower learning rate, `skip` leaves the step out.
    """

    nonfinite: WatchdogAction = MISSING
    """A loss or gradients that are not a number. With `skip`, `rollback` and `stop` such a step changes no weight."""
    zero: WatchdogAction = MISSING
    """A loss of exactly zero, or a step without a token that has a loss: `ignore`, `warn` or `stop`."""
    divergence: WatchdogAction = MISSING
    """A smoothed loss (0.9 of the step before) of more than `divergence_factor` times its lowest value, and of more
    than 1 above it: `ignore`, `warn`, `rollback` or `stop`."""
    slow: WatchdogAction = MISSING
    """A step that takes more than `slow_factor` times the median of the latest 50, and a second: `ignore`, `warn` or
    `stop`."""
    stalled: WatchdogAction = MISSING
    """No batch within `stalled_seconds`: `ignore`, `warn` or `stop`. A process of `trainer.dataloader_num_workers` that
    has died always ends the training."""
    divergence_factor: float = 3.0
    """When a loss counts as diverged."""
    slow_factor: float = 10.0
    """When a step counts as slow."""
    stalled_seconds: float = 600.0
    """How long a batch may take."""
    rollback_factor: float = 0.5
    """What a rollback multiplies the learning rate with."""
    max_rollbacks: int = 3
    """After so many rollbacks the training stops instead."""
    max_skips: int = 10
    """After so many skipped steps in a row the training stops."""

    def __post_init__(self) -> None:
        able = {
            "nonfinite": ("ignore", "warn", "skip", "rollback", "stop"),
            "divergence": ("ignore", "warn", "rollback", "stop"),
            **dict.fromkeys(("zero", "slow", "stalled"), ("ignore", "warn", "stop")),
        }
        for name, actions in able.items():
            action = getattr(self, name).value
            require(action in actions, f"watchdog.{name}", f"be one of {', '.join(actions)}", action)
        for name in ("divergence_factor", "slow_factor"):
            value = getattr(self, name)
            require(1 < value < math.inf, f"watchdog.{name}", "be above 1 and finite", value)
        require(0 < self.rollback_factor <= 1, "watchdog.rollback_factor", "be in (0, 1]", self.rollback_factor)
        require(0 < self.stalled_seconds < math.inf, "watchdog.stalled_seconds", "be positive and finite",
                self.stalled_seconds)  # fmt: skip
        for name in ("max_rollbacks", "max_skips"):
            require(getattr(self, name) > 0, f"watchdog.{name}", "be positive", getattr(self, name))


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """What is measured, by `task=evaluate` and during training."""

    name: EvaluationName = EvaluationName.rows
    """`rows` (held-out rows of `data`: loss, perplexity, metrics), `mmlu` or `lm_eval`; chosen with `evaluation=`. A
    training always measures the rows too."""
    metrics: list[str] = field(default_factory=list)
    """Metrics of generated answers: `exact_match`; `evaluate:NAME`, one of Hugging Face's `evaluate` library; or your
    own `module:function`, called with a list of predictions and a list of references, returning a number, or one
    number a row. Empty: nothing is generated."""
    baseline: bool = True
    """Measure the untuned base too, for the before -> after comparison."""
    generate_samples: int | None = None
    """Generate answers for at most so many held-out rows; null: for all."""
    show_predictions: int = 5
    """Predictions to print, and to send to the tracker at each evaluation."""
    path: str | None = None
    """`mmlu`: a file of questions, a JSON array or an object a line, each with `subject`, `input`, `output`; unset: the
    hub's `cais/mmlu`. `lm-eval`: a folder with tasks of your own."""
    split: MmluSplit = MmluSplit.val
    """`mmlu`: `val` or `test`, the split of the hub's set; for a file, what to call it."""
    shots: int | None = None
    """Solved questions before each: of the hub's MMLU 0 to 5 (unset: 5; a file brings its own), of lm-eval any (unset:
    as the task says)."""
    max_samples: int | None = None
    """`mmlu`: ask the first so many questions; `lm-eval`: the first so many of each task. Null: all."""
    source_max_len: int = 2048
    """`mmlu`: longest prompt in tokens; a longer one loses solved questions, and the beginning of its own last."""
    tasks: list[str] = field(default_factory=list)
    """`lm-eval`: names of the harness's tasks, e.g. `[arc_easy,hellaswag]`."""

    def __post_init__(self) -> None:
        for name in ("generate_samples", "max_samples"):
            value = getattr(self, name)
            require(value is None or value > 0, f"evaluation.{name}", "be positive or null", value)
        require(self.source_max_len > 0, "evaluation.source_max_len", "be positive", self.source_max_len)
        shown = self.show_predictions
        require(shown >= 0, "evaluation.show_predictions", "not be negative", shown)
        for name in self.metrics:
            if FUNCTION_PATH.fullmatch(name) or name in METRIC_NAMES:
                continue
            if name not in (known := [*METRIC_NAMES, *installed_names(METRIC_GROUP)]):
                raise ConfigError(
                    f"evaluation.metrics: {name!r} is unknown{did_you_mean(name, known)}; choose from "
                    f"{', '.join(known)}, evaluate:NAME of the evaluate library, or name your own function as "
                    "module:function"
                )
        names = ["loss", "perplexity", *map(metric_name, self.metrics)]
        for name in self.metrics:
            if names.count(metric_name(name)) > 1:
                raise ConfigError(
                    f"evaluation.metrics: two metrics would be called {metric_name(name)}; leave one out, or give your "
                    "function another name"
                )
        self._check_read()
        shots = self.shots
        if self.name is EvaluationName.mmlu:
            require(shots is None or 0 <= shots <= 5, "evaluation.shots", "lie between 0 and 5 for MMLU", shots)
            if shots is not None and self.path is not None:
                raise ConfigError(
                    f"evaluation.shots={shots} is not read beside evaluation.path: a file brings its solved questions "
                    "along; leave one of them out"
                )
        require(shots is None or shots >= 0, "evaluation.shots", "not be negative", shots)
        if self.name is EvaluationName.lm_eval and not self.tasks:
            raise ConfigError(
                "evaluation=lm-eval needs evaluation.tasks, names of the harness's tasks, e.g. "
                "evaluation.tasks=[arc_easy]"
            )

    def _check_read(self) -> None:
        """Refuses a value that the chosen evaluation does not read."""
        suites = (EvaluationName.mmlu, EvaluationName.lm_eval)
        read_by = {
            "path": suites,
            "shots": suites,
            "max_samples": suites,
            "tasks": suites[1:],
            "split": suites[:1],
            "source_max_len": suites[:1],
        }
        unset: dict[str, Any] = {"tasks": [], "split": MmluSplit.val, "source_max_len": 2048}
        for name, readers in read_by.items():
            if self.name not in readers and getattr(self, name) != unset.get(name):
                chosen = " or ".join(reader.value.replace("_", "-") for reader in readers)
                raise ConfigError(
                    f"evaluation.{name} is read with evaluation={chosen} only; choose that, or leave it out"
                )


@dataclass(kw_only=True, slots=True)
class MergeConfig:
    """How `task=merge` makes one model of base and adapter."""

    base: MergeBase = MISSING
    """Add the adapter to the `dequantized` weights it was trained on, or to the `original` 16-bit ones."""
    dtype: ComputeDtype = ComputeDtype.auto
    """The precision of the merged weights; `auto`: the one that the run computes in."""
    max_shard_size: str = "5GB"
    """The largest file of weights."""
    prompts: int = 16
    """Prompts of the data's held-out rows on which the merged model is compared with the adapter on its quantized
    base; each is cut to 256 tokens."""
    max_kl: float | None = None
    """The largest mean KL divergence, in nats a token, that is accepted; unset: 0.001 for `dequantized` (with 8 bits
    0.01: they round the activations too), 0.1 for `original`, whose weights are not those that were trained on, and
    never less than twice what computing in 16 bits does to the adapter on its base itself."""

    def __post_init__(self) -> None:
        require(self.prompts > 0, "merge.prompts", "be positive", self.prompts)
        limit = self.max_kl
        require(limit is None or 0 < limit < math.inf, "merge.max_kl", "be positive and finite, or null", limit)
        require(parse_size(self.max_shard_size) is not None, "merge.max_shard_size", "be a size such as 5GB",
                self.max_shard_size)  # fmt: skip


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """What `task=plan` plans for: memory and time of the training that the rest of the config describes."""

    device: str = "this"
    """The card: `this` (the GPU found here), `t4`, `v100-32gb`, `rtx-3090`, `rtx-4090`, `rtx-5090`, `a10`, `l4`,
    `a6000`, `l40s`, `a100-40gb`, `a100-80gb`, `h100` or `h200`."""
    step: PlanStep = MISSING
    """`plain`: transformers' layers with PEFT's adapters, operation by operation. `fast`: fused linear layers and
    attention, compiled layers, the loss without all logits. `auto`: what `trainer.compile`, `fused_linear`,
    `fused_attention` and `fused_loss` choose on a GPU, `plain` if any of them is off. Chosen with `plan=`."""
    length: int | None = None
    """Tokens of a row; unset: `data.pack_length`, else the longest that the limits of `data` leave."""

    def __post_init__(self) -> None:
        names = ("this", *CARD_NAMES)
        if self.device not in names:
            raise ConfigError(
                f"plan.device={self.device!r} is unknown{did_you_mean(self.device, names)}; choose one of "
                f"{', '.join(names)}"
            )
        require(self.length is None or self.length > 0, "plan.length", "be positive or null", self.length)


@dataclass(kw_only=True, slots=True)
class GenerationConfig:
    """How answers are generated, in the names of `transformers.GenerationConfig`."""

    batch_size: int = 16
    """Prompts a batch, left-padded and sorted by length."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    min_new_tokens: int | None = None
    """Shortest answer in tokens."""
    do_sample: bool = False
    """Draw tokens at random; false: greedy or beam search."""
    num_beams: int = 1
    """Beams of the beam search; 1: none."""
    num_beam_groups: int = 1
    """Groups of diverse beam search; above 1 runs transformers' community code (`model.trust_remote_code`)."""
    penalty_alpha: float | None = None
    """Contrastive search; runs transformers' community code (`model.trust_remote_code`)."""
    use_cache: bool = True
    """Reuse keys and values of earlier tokens."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    top_k: int = 50
    """Sample among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this much probability."""
    typical_p: float = 1.0
    """Locally typical sampling (arXiv 2202.00666)."""
    diversity_penalty: float = 0.0
    """How much groups of beams avoid each other's tokens."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that stand already less likely."""
    length_penalty: float = 1.0
    """Above 0 favours longer beams."""
    no_repeat_ngram_size: int = 0
    """No n-gram of this size occurs twice; 0: no rule."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "num_beams", "num_beam_groups", "temperature"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"generation.{name}", "be positive", value)
        for name in ("top_k", "no_repeat_ngram_size", "diversity_penalty"):
            require(getattr(self, name) >= 0, f"generation.{name}", "not be negative", getattr(self, name))
        for name in ("top_p", "typical_p"):
            require(0 < getattr(self, name) <= 1, f"generation.{name}", "be in (0, 1]", getattr(self, name))
        penalty, alpha = self.repetition_penalty, self.penalty_alpha
        require(0 < penalty < math.inf, "generation.repetition_penalty", "be positive", penalty)
        require(alpha is None or alpha >= 0, "generation.penalty_alpha", "not be negative", alpha)
        low = self.min_new_tokens
        require(low is None or 0 <= low <= self.max_new_tokens, "generation.min_new_tokens", "be null or lie between 0 "
                "and generation.max_new_tokens", low)  # fmt: skip
        require(self.num_beams % self.num_beam_groups == 0, "generation.num_beam_groups", "divide generation.num_beams",
                self.num_beam_groups)  # fmt: skip
        self._check_read()

    def _check_read(self) -> None:
        """Refuses a value that the chosen search does not read."""
        sampling = (self.do_sample, "when sampling", "generation.do_sample=true")
        read = {
            **dict.fromkeys(("temperature", "top_p", "typical_p"), sampling),
            "top_k": (self.do_sample or bool(self.penalty_alpha), *sampling[1:]),
            "length_penalty": (self.num_beams > 1, "by beam search", "generation.num_beams=4"),
            "diversity_penalty": (self.num_beam_groups > 1, "by groups of beams", "generation.num_beam_groups=2"),
        }
        unset = {item.name: item.default for item in fields(self)}
        for name, (is_read, reader, remedy) in read.items():
            value = getattr(self, name)
            if value != unset[name] and not is_read:
                raise ConfigError(
                    f"generation.{name}={value:g} is read {reader} only; set {remedy} too, or leave it out "
                    f"(generation.{name}={unset[name]:g})"
                )


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where metrics go besides the run folder."""

    backend: str = MISSING
    """`none`, `wandb`, `tensorboard`, `mlflow` or `trackio`, chosen with `tracking=`; a tracker that an installed
    package adds; or a class of your own, as `module:Class`."""
    project: str = "qlora"
    """The project of wandb and Trackio, the experiment of MLflow."""
    entity: str | None = None
    """The wandb user or team; unset: the login's default."""
    group: str | None = None
    """Runs of one group are shown together; unset: those of a sweep."""
    tags: list[str] = field(default_factory=list)
    """Labels of the run, in wandb and MLflow; a job of a sweep has the sweep's name beside them."""
    mode: WandbMode = WandbMode.online
    """`offline` writes the wandb run to the run folder, to be sent later with `wandb sync`. `disabled` tracks nothing,
    nor does wandb where the environment has `WANDB_MODE=disabled` or `WANDB_DISABLED=true`."""
    uri: str | None = None
    """MLflow's server or database, e.g. `http://localhost:5000`; unset: the environment's MLFLOW_TRACKING_URI, else
    `sqlite:///outputs/mlflow/mlflow.db`."""
    log_adapter: bool = False
    """Store the finished adapter with the run, in wandb and MLflow."""

    def __post_init__(self) -> None:
        name = self.backend
        if name != NO_TRACKER and not FUNCTION_PATH.fullmatch(name) and tracker_path(name) is None:
            raise ConfigError(describe_unknown(name))

    @property
    def in_use(self) -> str:
        """The tracker that a run is sent to: `none` where `mode` or the environment disables it."""
        silenced = os.environ.get("WANDB_MODE") == "disabled" or (
            os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")
        )
        if self.mode is WandbMode.disabled or (silenced and self.backend == "wandb"):
            return NO_TRACKER
        return self.backend


@dataclass(kw_only=True, slots=True)
class ManifestConfig:
    """What `manifest.json` records of the repository that a run is started in."""

    diff: bool = False
    """Store the uncommitted changes themselves, too, without what may be secret in them; else the names of the changed
    files, how many lines each gained and lost, and the SHA-256 of the changes."""


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """How a sweep is run; its values are those of the command line, or of a file chosen with `sweep=`."""

    detach: bool = False
    """Submit the jobs and return; the same command shows their state later (`hydra/launcher=slurm`)."""


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run."""

    name: str | None = None
    """Name of the run or sweep: its folder below `outputs/` and its name in the tracker; unset: the time."""
    seed: int = 0
    """Seed of adapter weights, dropout and the order of the batches."""
    device: Device = Device.auto
    """`auto` takes the GPU (CUDA, ROCm or Intel XPU) if there is one, else the CPU; or `cpu`, `cuda`, `xpu`."""
    objective: str | None = "eval_loss"
    """The metric that a run returns to a sweeper; null: none."""
    resume: Resume = Resume.auto
    """What a start does in a folder that holds a run: `auto` goes on from the last good checkpoint, and refuses another
    config or other rows; `force` goes on in spite of such changes; `never` begins anew in a new folder (`NAME-2`)."""
    task: TaskConfig = MISSING
    model: ModelConfig = MISSING
    quantization: QuantizationConfig = MISSING
    lora: LoraConfig = MISSING
    data: DataConfig = MISSING
    trainer: TrainerConfig = MISSING
    watchdog: WatchdogConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    generation: GenerationConfig = MISSING
    tracking: TrackingConfig = MISSING
    adapter: str | None = None
    """What to evaluate, predict, chat with, merge or push: a folder of an adapter, of a merged model or of a finished
    run, or `none` for the untuned base. Unset: the adapter in this run's own folder (`hydra.run.dir=FOLDER`)."""
    base: SameBase = SameBase.auto
    """What happens where the weights of the base are not those that an adapter, or the run that goes on, was trained
    on: `auto` refuses them, `force` goes on with a warning."""
    repo: str | None = None
    """The hub repository that `task=push` writes to, e.g. `me/guanaco-7b`."""
    runs: str | None = None
    """What `task=report` shows: a folder of a run or of a sweep, or a pattern of such, e.g. `outputs/runs/*`."""
    run: str | None = None
    """The folder of the finished training that `task=replay` runs again and compares with."""
    source: str | None = None
    """What `task=migrate` reads, written `from=FILE`: a command or script of the original `qlora.py`, or a YAML of
    Axolotl, LLaMA-Factory or torchtune."""
    trusted: list[str] = field(default_factory=list)
    """Packages of your own whose code this config may name, in a `_target_` or as `module:function`, e.g.
    `trusted=[my_rows]`; given on the command line, or as `QLORA_TRUSTED=my_rows` in the environment, and in no file.
    Callbacks of `qlora` and `transformers` and metrics of `evaluate` need no trust. A full key with a dot, e.g.
    `hydra.launcher.setup`, lets a file set what is otherwise the command line's alone."""
    merge: MergeConfig = MISSING
    plan: PlanConfig = MISSING
    manifest: ManifestConfig = field(default_factory=ManifestConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Trainer callbacks by a name of your own: each a `_target_` with its arguments."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", "lie between 0 and 4294967295", self.seed)
        if self.name is not None and not is_folder_name(self.name):
            raise ConfigError(
                f"name={self.name[:80]!r} must be a plain folder name; use hydra.run.dir=FOLDER for another place"
            )
        self._check_task_keys()
        if self.task.name is TaskName.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo or ""):
            given = "is not set" if self.repo is None else f"must be OWNER/NAME, got {self.repo!r}"
            raise ConfigError(f"repo {given}; name the hub repository to upload to, e.g. repo=me/guanaco-7b")
        if self.task.name is TaskName.report and self.runs is None:
            raise ConfigError(
                "runs is not set; name what task=report shows, e.g. runs=outputs/sweeps/mine or runs='outputs/runs/*'"
            )
        if self.task.name is TaskName.replay and self.run is None:
            raise ConfigError("run is not set; name the finished training to run again, e.g. run=outputs/runs/mine")
        if self.task.name is TaskName.migrate and self.source is None:
            raise ConfigError(
                "from is not set; name what task=migrate reads, e.g. from=finetune.sh or from=axolotl.yaml"
            )
        for name, node in self.callbacks.items():
            is_one = isinstance(node, dict) and isinstance(node.get("_target_"), str)
            rule = "be a mapping with a _target_ (module.Class) and its arguments"
            require(is_one, f"callbacks.{name}", rule, node, "leave it out, or name the class")
            if not is_installed_callback(node["_target_"]):
                check_trusted(f"callbacks.{name}._target_", node["_target_"], [*CALLBACK_PACKAGES, *self.trusted])
            check_plain(f"callbacks.{name}", {key: value for key, value in node.items() if key != "_target_"})
        for key, name in named_functions(self):
            if name not in OWN_FUNCTIONS:
                check_trusted(key, name, self.trusted)
        _check_adapter_on_base(self.lora, self.quantization)
        _check_generation(self.generation, self.model)
        if not self.lora.enabled and (self.model.device_map or self.model.max_memory):
            raise ConfigError(
                "model.device_map and model.max_memory spread a frozen base; full finetuning (lora=none) needs the "
                "model on one device: leave them out"
            )
        if self.trainer.memory_budget is not None and (self.model.device_map or self.model.max_memory):
            raise ConfigError(
                "trainer.memory_budget counts one GPU's memory, and model.device_map and model.max_memory spread the "
                "base over several; leave the one or the others out"
            )
        if self.trainer.parallel is Parallel.fsdp:
            self._check_fsdp()
        self._check_watchdog()
        trains = self.task.name is TaskName.train and self.task.train
        if trains or self.task.name is TaskName.doctor:  # which says whether this machine can train so
            self._check_optimizer()
        if self.task.name is TaskName.report:  # the metrics are those of the runs that it reads
            return
        known = known_metrics(self.evaluation)
        # What lm-eval and the `evaluate` library measure is known when they have measured.
        beginnings = [metric_name(name) for name in self.evaluation.metrics if name.startswith(f"{METRIC_LIBRARY}:")]
        beginnings += ["lm_eval"] if self.evaluation.name is EvaluationName.lm_eval else []
        open_names = tuple(f"eval_{beginning}_" for beginning in beginnings)
        if self.objective is not None and not (self.objective in known or self.objective.startswith(open_names)):
            raise ConfigError(
                f"objective={self.objective!r} is no metric of this run{did_you_mean(self.objective, known)}; "
                f"choose one of {', '.join(known)} or null"
            )

    def _check_task_keys(self) -> None:
        """Refuses a key that names the input or output of another task."""
        for key, tasks in TASK_KEYS.items():
            owner, name = (self.task, key.removeprefix("task.")) if key.startswith("task.") else (self, key)
            value = getattr(owner, name)
            if self.task.name in tasks or value == next(item.default for item in fields(owner) if item.name == name):
                continue
            if key == "adapter" and self.task.name is TaskName.train and not self.task.train:
                continue  # which measures it and lets it answer
            readers = [f"task={task.value.replace('_', '-')}" for task in tasks]
            shown = f"{'from' if key == 'source' else key}={_written(value)}"
            raise ConfigError(
                f"{shown} is not read by task={self.task.name.value.replace('_', '-')}, but by "
                f"{' and '.join(filter(None, [', '.join(readers[:-1]), readers[-1]]))}; add "
                f"{'one of these' if len(readers) > 1 else readers[0]}, or leave {shown.partition('=')[0]} out"
            )

    def _check_watchdog(self) -> None:
        """Refuses actions that the training cannot take."""
        rollback = [name for name in ("nonfinite", "divergence")
                    if getattr(self.watchdog, name) is WatchdogAction.rollback]  # fmt: skip
        if rollback and self.trainer.save_steps is None:
            raise ConfigError(
                f"watchdog.{rollback[0]}=rollback needs checkpoints to go back to; set trainer.save_steps, e.g. to 100"
            )

    def _check_optimizer(self) -> None:
        """Refuses an optimizer that this machine, or the device that the run names, does not have."""
        name = self.trainer.optim
        check_installed(name)
        if OPTIMIZERS[name].needs_cuda and self.device in (Device.cpu, Device.xpu):
            raise no_cuda(name, self.device.value)

    def _check_fsdp(self) -> None:
        """Refuses what reads or draws the weights of a base that no process holds whole."""
        lora, model = self.lora, self.model
        faults = {
            "lora=none": (not lora.enabled, "it trains all weights, and the frozen ones are shared out"),
            "lora.use_dora=true": (lora.use_dora, "it reads whole weights"),
            "lora.init=eva": (lora.init is LoraInit.eva, "it runs the whole base before the training"),
            "quantization.bits=8": (self.quantization.bits == 8, "8-bit weights keep their scales elsewhere"),
            "model.device_map": (bool(model.device_map or model.max_memory), "it spreads the base in one process"),
            "trainer.memory_budget": (self.trainer.memory_budget is not None, "its formula counts whole layers"),
        }
        for name, (is_set, reason) in faults.items():
            if is_set:
                raise ConfigError(
                    f"trainer.parallel=fsdp and {name} exclude each other: {reason}; leave one of them out"
                )


def no_cuda(optim: str, device: str) -> ConfigError:
    """Returns the error for an optimizer that needs a CUDA device on another one."""
    return ConfigError(
        f"trainer.optim={optim} runs on CUDA only, and this run computes on {device}; set trainer.optim="
        f"{optim.removeprefix('paged_').removesuffix('_32bit')}"
    )


def is_folder_name(name: str) -> bool:
    """Returns whether a text names a folder right below another one, on every system: no path, and not too long."""
    return name not in (".", "..") and bool(re.fullmatch(r"[^/\x00-\x1f\x7f]+", name)) and len(name.encode()) <= 200


def is_installed_callback(target: str) -> bool:
    """Returns whether a `_target_` is the name by which an installed package adds a trainer callback."""
    return "." not in target and target in installed_names(CALLBACK_GROUP)


def named_functions(config: Config) -> Iterator[tuple[str, str]]:
    """Yields the full keys whose values name a function or class of the user's, with the names: `module:function`."""
    data = config.data
    texts = {"data.path": data.path, "data.eval_path": data.eval_path, "data.format": data.format}
    texts |= {"tracking.backend": config.tracking.backend}
    for name, part in data.mix.items():
        texts |= {f"data.mix.{name}.path": part.path, f"data.mix.{name}.format": part.format}
    texts |= {
        f"evaluation.metrics[{index}]": name
        for index, name in enumerate(config.evaluation.metrics)
        if not name.startswith(f"{METRIC_LIBRARY}:")
    }
    return ((key, text) for key, text in texts.items() if text is not None and FUNCTION_PATH.fullmatch(text))


def check_trusted(key: str, name: str, trusted: Sequence[str]) -> None:
    """Raises `ConfigError` unless the code that a config names is of a package that is trusted."""
    package = re.split(r"[.:]", name)[0]
    if package not in trusted:
        added = [name for name in trusted if name not in CALLBACK_PACKAGES]
        raise ConfigError(
            f"{key}={name}: code of the package {package!r} would run, which is not trusted; if you know what it does, "
            f"add trusted=[{','.join([*added, package])}] to the command line"
        )


def check_plain(key: str, value: Any) -> None:
    """Raises `ConfigError` unless an argument of what a config names is a plain value, which names no code itself."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str) or re.fullmatch(r"_\w+_", name):
                raise ConfigError(
                    f"{key}.{name}={item}: an argument is a plain value and names no code, whatever trusted=[...] "
                    "holds; take it out"
                )
            check_plain(f"{key}.{name}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_plain(f"{key}[{index}]", item)
    elif not (value is None or isinstance(value, str | bool | int | float)):
        raise ConfigError(f"{key} must be a plain value, a list or a mapping, got {value!r}")


def _written(value: object) -> str:
    """Returns a value as the command line writes it."""
    if isinstance(value, Enum):
        return str(value.value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def metric_name(name: str) -> str:
    """Returns what a metric of `evaluation.metrics` is called in results: the function, or `evaluate_NAME`."""
    module, _, function = name.rpartition(":")
    return f"{METRIC_LIBRARY}_{function}" if module == METRIC_LIBRARY else function


def known_metrics(evaluation: EvaluationConfig) -> list[str]:
    """Returns the names of the metrics that a training run reports."""
    own = [metric_name(name) for name in evaluation.metrics if not name.startswith(f"{METRIC_LIBRARY}:")]
    measured = ["loss", "perplexity", *own]
    if evaluation.name is EvaluationName.mmlu:
        measured += [f"mmlu_{evaluation.split.value}_{name}" for name in ("accuracy", "loss")]
    speed = ["train_tokens_per_second", "train_mfu", "train_data_wait"]
    training = ["train_loss", *speed, "train_runtime", "train_memory_retries", "peak_memory_gb"]
    training += [f"train_watchdog_{name}" for name in WATCHDOG_COUNTS]
    return [f"eval_{name}" for name in measured] + [f"base_eval_{name}" for name in measured] + training


def _check_adapter_on_base(lora: LoraConfig, quantization: QuantizationConfig) -> None:
    bits = quantization.bits
    if not lora.enabled:
        if bits in (4, 8):
            raise ConfigError(
                f"lora=none trains all weights, which {bits}-bit weights do not allow; choose quantization=none "
                "(16 bit) or quantization=fp32, or an adapter with lora=all-linear"
            )
        return
    if lora.init in (LoraInit.pissa, LoraInit.olora) and bits in (4, 8):
        raise ConfigError(
            f"lora.init={lora.init.value} rewrites the base weights, which quantization.bits={bits} does not allow "
            "exactly; it is valid with quantization=none or quantization=fp32. With 4 bits use lora.init=loftq or eva"
        )
    if lora.use_dora and bits == 8:
        raise ConfigError(
            "lora.use_dora=true (lora=dora) needs the weights as numbers at each step, which PEFT cannot read of 8-bit "
            "layers in training; choose quantization=nf4 or quantization=none, or train without it (lora=all-linear "
            "lora.use_dora=false)"
        )
    if lora.init is LoraInit.loftq and bits != 4:
        raise ConfigError(
            f"lora.init=loftq repairs the error of 4-bit weights, got quantization.bits={bits}; choose "
            "quantization=nf4, or another lora.init"
        )


def _check_generation(generation: GenerationConfig, model: ModelConfig) -> None:
    community = generation.num_beam_groups > 1 or bool(generation.penalty_alpha)
    if community and not model.trust_remote_code:
        key = "num_beam_groups" if generation.num_beam_groups > 1 else "penalty_alpha"
        raise ConfigError(
            f"generation.{key}: transformers moved this search to a hub repository of its own and runs it as remote "
            "code; set model.trust_remote_code=true to allow that, or leave the option out"
        )
