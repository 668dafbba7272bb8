"""Unsloth and TRL as contestants of `step.py`, which starts this file as a process for each: they change torch,
transformers and one another when they are imported.

    python benchmarks/rivals.py --worker TASK

Both load the weights that qlora draws from a checkpoint, which the task "save" writes once. The task "step" is, for
Unsloth without packing, the loop that times qlora too, around Unsloth's model; else a whole `SFTTrainer` on the same
rows of tokens, whose steps include its loader. The task "end to end" is the trainer on the texts that `python -m
qlora` reads, with logging and saving.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from step import (
    ALL,
    EVERY,
    LENGTHS,
    LOG,
    LONG,
    WARM_UP,
    batches,
    build_optimizer,
    is_mixture,
    steps_end_to_end,
    steps_of_rows,
    time_steps,
    write_texts,
)

EXPERTS = ["gate_up_proj", "down_proj"]
"""The matrices of a mixture's experts, as transformers calls them."""


def save_base(base: str, overrides: list[str]) -> None:
    """Writes the drawn base and its tokenizer as a checkpoint of transformers into the folder `base`.

    It is in 4 bits, and for a mixture of experts in 16: no rival reads experts in 4 bits.
    """
    from qlora.config.compose import compose
    from qlora.run import Run

    with tempfile.TemporaryDirectory() as folder:
        whole = ["quantization=none"] if is_mixture(overrides) else []
        run = Run(compose([*EVERY, *overrides, *whole]), folder).session
        run.load_base().save_pretrained(base)
        run.tokenizer.save_pretrained(base)


def target_names(config: Any) -> list[str]:
    """Returns the names of all layers that qlora gives an adapter, experts included: what Unsloth wants to be told."""
    from qlora.planning.training_plan import find_shape

    shape = find_shape(config)
    names = dict.fromkeys(linear.name.rpartition(".")[2] for linear in shape.linears if linear.is_adapted)
    return [*(name for name in names if name not in EXPERTS), *EXPERTS] if shape.experts else [*names]


def load_model(package: str, base: str, config: Any, placement: Any, max_seq_length: int = LONG) -> tuple[Any, Any]:
    """Returns the saved base with a fresh adapter, as the package builds it, and PEFT's config if it still has none."""
    if package == "unsloth":
        from unsloth import FastLanguageModel

        again = "unsloth" if config.trainer.gradient_checkpointing else False
        model, _ = FastLanguageModel.from_pretrained(
            base,
            max_seq_length=max_seq_length,
            dtype=placement.param_dtype,
            load_in_4bit=True,
            use_gradient_checkpointing=again,
        )
        # Those of its loaders that do not serve one family alone leave out names of vision's, such as `conv`.
        everywhere = {"finetune_vision_layers": True} if os.environ.get("UNSLOTH_USE_NEW_MODEL") == "1" else {}
        adapted = FastLanguageModel.get_peft_model(
            model,
            **everywhere,
            r=config.lora.r,
            target_modules=target_names(config),
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            bias="none",
            use_gradient_checkpointing=again,
            random_state=config.seed,
        )
        return FastLanguageModel.for_training(adapted), None
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=placement.param_dtype, device_map={"": placement.device})
    return model, LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora.r,
        target_modules="all-linear",
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        bias="none",
    )


def time_loop(workload: str, name: str, model: Any, config: Any, placement: Any, **options: Any) -> dict[str, Any]:
    """Times the loop that times qlora, around a model of Unsloth."""
    optimizer = build_optimizer(config, model)
    shrink = 16 if options.pop("small") else 1
    source = batches(workload, name, config.model.architecture.vocab_size, placement.device, shrink)
    return time_steps(model, optimizer, source, lambda _: placement.autocast(), placement.device, **options)


def trainer_options(placement: Any, folder: str, steps: int) -> dict[str, Any]:
    """Returns what the arguments of every trainer of TRL say."""
    import torch

    return {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.3,
        "optim": "paged_adamw_32bit",
        "bf16": placement.compute_dtype is torch.bfloat16,
        "use_cpu": placement.device.type != "cuda",
        "logging_steps": LOG,
        "report_to": "none",
        "disable_tqdm": True,
    }


def time_training(build: Callable[[Any], Any], device: Any, measured: range) -> dict[str, Any]:
    """Trains with the trainer that `build` makes with a callback; returns the `seconds` of the steps `measured`.

    Steps are counted from 1. The time ends with the training, so that a checkpoint after the last step counts.
    """
    import torch
    from transformers import TrainerCallback

    from qlora.runtime.device import device_name, reset_peak_memory
    from qlora.training.peak_memory import PeakMemory

    on_gpu, moments = device.type == "cuda", [0.0]

    class StepEnds(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            memory.watch(kwargs["optimizer"])
            moments[0] = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_gpu and state.global_step in (1, measured.start - 1):
                torch.cuda.synchronize()
            moments.append(time.monotonic())

    trainer = build(StepEnds())
    reset_peak_memory(device)
    memory = PeakMemory(device)
    assert math.isfinite(trainer.train().training_loss)
    if on_gpu:
        torch.cuda.synchronize()
    return {
        "seconds": time.monotonic() - moments[measured.start - 1],
        "peak_gb": memory.gb(),
        "first_step_seconds": moments[1] - moments[0],
        "trained_parameters": sum(item.numel() for item in trainer.model.parameters() if item.requires_grad),
        "device": device_name(device),
    }


def time_trainer(
    rows: Any, base: str, model: Any, peft: Any, placement: Any, folder: str, measured: range, **options: Any
) -> dict[str, Any]:
    """Trains with `SFTTrainer`; returns the speed of the steps of the numbers `measured`, counted from 1."""
    import torch
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    device = placement.device
    tokens = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(measured.stop - 1)]

    def build(callback: Any) -> Any:
        trainer: Any = SFTTrainer(
            model=model,
            args=SFTConfig(**trainer_options(placement, folder, measured.stop - 1), **options),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=peft,
            callbacks=[callback],
        )
        if trainer.args.packing != options["packing"]:
            sys.exit("the trainer does not pack here")
        own_step = trainer.training_step

        def counted_step(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")  # rows that are joined have none, and no padding
            count = inputs["input_ids"].numel() if mask is None else mask.sum()
            tokens[trainer.state.global_step] += count
            return own_step(model, inputs, *rest, **named)

        trainer.training_step = counted_step
        return trainer

    results = time_training(build, device, measured)
    counted = sum(int(item) for item in tokens[measured.start - 1 :])
    return {"tokens_per_second": counted / results.pop("seconds"), **results}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Times a rival in this process, into which its package has been imported."""
    from datasets import Dataset, load_dataset

    from qlora.config.compose import compose
    from qlora.quantization.placement import find_placement
    from qlora.runtime.device import find_device

    workload, name, steps, small = (task[key] for key in ("workload", "name", "steps", "small"))
    package, packs, shrink = ALL[name].package, ALL[name].packs, 16 if small else 1
    config = compose([*EVERY, *task["overrides"]])
    placement = find_placement(config.quantization, find_device(config.device))
    length = LENGTHS.get(workload, LONG)
    model, peft = load_model(package, task["base"], config, placement, length)
    whole = task["do"] == "end to end"
    if package == "unsloth" and not packs and not whole:
        options = {"steps": steps, "profile": task["profile"], "small": small}
        return time_loop(workload, name, model, config, placement, **options)
    options = {
        "per_device_train_batch_size": config.trainer.per_device_train_batch_size,
        "gradient_accumulation_steps": config.trainer.gradient_accumulation_steps,
        "gradient_checkpointing": bool(config.trainer.gradient_checkpointing),
        "packing": packs,
        "max_length": length // shrink,
        "use_liger_kernel": package == "trl" and placement.device.type == "cuda" and bool(find_spec("liger_kernel")),
    }
    with tempfile.TemporaryDirectory() as folder:
        if whole:
            file = Path(folder) / "rows.jsonl"
            write_texts(file, shrink)
            rows = load_dataset("json", data_files=str(file), split="train", cache_dir=folder)
            order = "random" if packs else "group_by_length"
            measured = range(LOG + 1, steps_end_to_end(small=small) + 1)
            options |= {"train_sampling_strategy": order, "save_strategy": "steps", "save_steps": measured.stop - 1}
        else:
            measured = range(WARM_UP + 1, WARM_UP + steps + 1)
            count = measured.stop * (2 if packs else 1)  # a step of packs takes more rows
            steps_to_train = islice(steps_of_rows(workload, config.model.architecture.vocab_size, shrink), count)
            rows = Dataset.from_list(
                [{"input_ids": row["input_ids"].tolist()} for step in steps_to_train for row in step]
            )
            options |= {"train_sampling_strategy": "sequential", "save_strategy": "no"}
        results = time_trainer(rows, task["base"], model, peft, placement, folder, measured, **options)
        return {**results, "is_trainer": not whole}  # whose step includes its loader


def set_up(package: str, base: str) -> None:
    """Sets this process up for a package, before anything is imported that it changes."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # they would split a batch over all
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    os.environ["UNSLOTH_FUSED_PREFERENCE_LOSS"] = "1"
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(Path(base).with_name("unsloth_compiled_cache"))
    if package == "unsloth":
        import unsloth  # noqa: F401  (before all that it changes)
    elif package == "trl":
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"  # TRL's loss is a kernel, which is slow this way


def main() -> None:
    """Does the task of the command line and prints what came out as JSON."""
    task = json.loads(sys.argv[sys.argv.index("--worker") + 1])
    saves = task["do"] == "save"
    set_up("qlora" if saves else ALL[task["name"]].package, task["base"])
    if saves:
        save_base(task["base"], task["overrides"])
        print(json.dumps({"saved": task["base"]}))
        return
    print(json.dumps(measure(task)))


if __name__ == "__main__":
    main()
