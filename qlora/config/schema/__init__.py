"""Every config group as a dataclass, one module per group; imports no torch.

The docstring below a field is its manual, which `qlora --help GROUP` prints. Options set values in `conf/`; a default
stands here only where no option sets the field. `slots=True` makes it impossible to ignore an unknown key.
"""

from qlora.config.schema.code_names import CALLBACK_PACKAGES, FUNCTION_PATH, OWN_FUNCTIONS, check_plain, check_trusted
from qlora.config.schema.data import DataConfig, MixConfig, OnEmpty, OnTooLong, Overlap, Pairs, Stop, TrainOn
from qlora.config.schema.evaluation import (
    METRIC_LIBRARY,
    METRIC_NAMES,
    EvaluationConfig,
    EvaluationName,
    MmluSplit,
    known_metrics,
    metric_name,
)
from qlora.config.schema.export import ExportConfig, ExportFormat, GgufType
from qlora.config.schema.generation import GenerationConfig
from qlora.config.schema.head import HeadConfig, HeadDtype, Pooling
from qlora.config.schema.lora import LoraBias, LoraConfig, LoraDtype, LoraExperts, LoraInit
from qlora.config.schema.loss import LOSS_SETTINGS, LossConfig, Reference
from qlora.config.schema.manifest import ManifestConfig
from qlora.config.schema.merge import MergeBase, MergeConfig
from qlora.config.schema.model import MIXTURE_FIELDS, ArchitectureConfig, ModelConfig, Weights, described_settings
from qlora.config.schema.plan import PlanConfig, PlanStep
from qlora.config.schema.quantization import (
    BaseProducts,
    ComputeDtype,
    ExpertsBits,
    ExpertsOffload,
    QuantizationConfig,
    QuantType,
)
from qlora.config.schema.root import Config, Device, Resume, SameBase, is_folder_name, named_functions, no_cuda
from qlora.config.schema.serve import ServeConfig
from qlora.config.schema.sweep import CompareConfig, Direction, SweepConfig
from qlora.config.schema.task import TASK_KEYS, SweepMethod, TaskConfig, TaskName
from qlora.config.schema.tracking import TrackingConfig, WandbMode
from qlora.config.schema.trainer import FlashAttention, Keep, Parallel, TrainerConfig
from qlora.config.schema.values import HOLDS, MAPPINGS
from qlora.config.schema.verify import VerifyConfig
from qlora.config.schema.watchdog import WATCHDOG_COUNTS, WatchdogAction, WatchdogConfig

__all__ = [
    "CALLBACK_PACKAGES",
    "FUNCTION_PATH",
    "HOLDS",
    "LOSS_SETTINGS",
    "MAPPINGS",
    "METRIC_LIBRARY",
    "METRIC_NAMES",
    "MIXTURE_FIELDS",
    "OWN_FUNCTIONS",
    "TASK_KEYS",
    "WATCHDOG_COUNTS",
    "ArchitectureConfig",
    "BaseProducts",
    "CompareConfig",
    "ComputeDtype",
    "Config",
    "DataConfig",
    "Device",
    "Direction",
    "EvaluationConfig",
    "EvaluationName",
    "ExpertsBits",
    "ExpertsOffload",
    "ExportConfig",
    "ExportFormat",
    "FlashAttention",
    "GenerationConfig",
    "GgufType",
    "HeadConfig",
    "HeadDtype",
    "Keep",
    "LoraBias",
    "LoraConfig",
    "LoraDtype",
    "LoraExperts",
    "LoraInit",
    "LossConfig",
    "ManifestConfig",
    "MergeBase",
    "MergeConfig",
    "MixConfig",
    "MmluSplit",
    "ModelConfig",
    "OnEmpty",
    "OnTooLong",
    "Overlap",
    "Pairs",
    "Parallel",
    "PlanConfig",
    "PlanStep",
    "Pooling",
    "QuantType",
    "QuantizationConfig",
    "Reference",
    "Resume",
    "SameBase",
    "ServeConfig",
    "Stop",
    "SweepConfig",
    "SweepMethod",
    "TaskConfig",
    "TaskName",
    "TrackingConfig",
    "TrainOn",
    "TrainerConfig",
    "VerifyConfig",
    "WandbMode",
    "WatchdogAction",
    "WatchdogConfig",
    "Weights",
    "check_plain",
    "check_trusted",
    "described_settings",
    "is_folder_name",
    "known_metrics",
    "metric_name",
    "named_functions",
    "no_cuda",
]
