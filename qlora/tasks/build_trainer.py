"""Builds the trainer of a session: the fast step, the memory budget, the meter, the callbacks."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qlora import adapters
from qlora.config.saved_config import config_to_dict
from qlora.config.schema import PlanStep
from qlora.data.batching.collate import count_work
from qlora.data.batching.item_stream import MOST_ROWS
from qlora.data.batching.token_store import column
from qlora.data.reference_store import WithReference
from qlora.errors import DataError, RunError
from qlora.models.cu_seqlens import hand_cu_seqlens
from qlora.models.outputs import switch_cache
from qlora.models.packing_guard import check_packing
from qlora.planning.memory_plan import FRAGMENTS, Ledger
from qlora.planning.read_shape import read_shape
from qlora.planning.time_plan import Operations, active_adapters, count_operations
from qlora.planning.training_plan import read_setup
from qlora.runtime import console, distributed
from qlora.runtime.device import free_memory, matrix_rate
from qlora.runtime.row_processes import row_processes
from qlora.runtime.run_folder import config_digest
from qlora.runtime.sweep_job import TRIAL_VARIABLE
from qlora.session import Session
from qlora.step.fast_step import FastStep, Packs
from qlora.step.part import ON
from qlora.tasks.build_reference import build_items
from qlora.text import parse_size
from qlora.training.arguments import build_arguments
from qlora.training.keep import KeepCallback
from qlora.training.memory_budget import Budget, Formula
from qlora.training.meter import Meter
from qlora.training.page_callback import Page, PageCallback
from qlora.training.peak_memory import PeakMemory
from qlora.training.profiling import ProfileCallback
from qlora.training.progress import ProgressCallback
from qlora.training.resume import CACHES_REFERENCE
from qlora.training.trackers import Tracker, tracker_ids
from qlora.training.trackers.callback import TrackerCallback
from qlora.training.trainer import QLoraTrainer
from qlora.upstream.peft import base_of

log = logging.getLogger(__name__)


def build_trainer(
    session: Session,
    model: PreTrainedModel | PeftModel,
    callbacks: list[Any],
    tracker: Tracker,
    page: Page | None = None,
    peak: PeakMemory | None = None,
    checkpoint: Path | None = None,
) -> QLoraTrainer:
    """Returns the trainer of a model on the session's rows; `callbacks` are the user's own, `page` shows the run.

    `peak` follows the memory of the run, from its model on; `checkpoint` is where it resumes.
    """
    config, placement = session.config, session.placement
    step = build_step(session, model)
    data = session.data
    assert data.train is not None
    arguments = build_arguments(
        config.trainer,
        output_dir=session.folder.checkpoints,
        device=placement.device,
        compute=placement.compute_dtype,
        seed=config.seed,
        length=session.length,
    )
    if arguments.world_size != distributed.world_size():
        raise RunError(
            f"{distributed.world_size()} processes were launched (WORLD_SIZE), and training would use "
            f"{arguments.world_size} of them; {distributed.LAUNCH_HINT}"
        )

    def measure(current: torch.nn.Module, step: int) -> dict[str, float]:
        return session.in_main_process(lambda: session.measure_step(current, step, tracker))

    peak = peak or PeakMemory(placement.device)
    operations = _count_operations(session, model)
    meter = _build_meter(session, operations, peak)
    windows = tuple(operations.per_pair) if operations is not None else (None,)
    lengths = data.lengths.tolist()
    width = config.data.pack_width or 0 if step.is_compiled else 0
    budget = build_budget(
        session, step, max_length=max(width, data.max_length), most_targets=data.most_targets, memory=peak
    )
    _say_step(step, budget)
    _say_sharing(session)
    items = build_items(session, model, step, checkpoint)
    trainer = QLoraTrainer(
        model=model,
        arguments=arguments,
        rows=items,
        lengths=lengths,
        collate=session.collator(width),
        count=partial(count_work, pad_token_id=session.pad_token_id, windows=windows),
        measure=measure,
        verify=session.finish_adapter,
        loraplus_lr_ratio=config.lora.loraplus_lr_ratio if config.lora.enabled else None,
        ranks=adapters.build_rank_schedule(config.lora, model),
        step=step,
        objective=session.objective,
        meter=meter,
        budget=budget,
        peak=peak,
        stop=session.stop,
        metadata=_checkpoint_metadata(session) | {CACHES_REFERENCE: isinstance(items, WithReference)},
        watchdog=config.watchdog,
        name_rows=data.named_rows,
        callbacks=[*_run_callbacks(session, tracker, page, meter), *callbacks],
        needed=session.keep_rule.needed,
        stream=data.stream,
        shared=row_processes(config.trainer.context_parallel),
        most_rows=limits.max_rows if (limits := _limits(session)) is not None else 0,
    )
    switch_cache(base_of(model) if isinstance(model, PeftModel) else model, on=False)
    if config.data.packing:
        hand_cu_seqlens(model)
        size = config.trainer.per_device_train_batch_size
        check_packing(model, placement, batch_size=size, logits_of=step.packed_logits)
    return trainer


def _checkpoint_metadata(session: Session) -> dict[str, Any]:
    """Returns what a checkpoint says of its run, by which it is refused for another one."""
    return {
        "config": config_digest(config_to_dict(session.config)),
        "data": session.data.report.fingerprint,
        "processes": distributed.world_size(),
        "rows": session.rows_a_step,
        "shares_prompts": session.data.shares_prompts,
        "trackers": tracker_ids(session.folder.path),
    }


def _run_callbacks(session: Session, tracker: Tracker, page: Page | None, meter: Meter) -> list[Any]:
    """Returns what watches every training run, before the callbacks of the user."""
    profiles = session.config.trainer.profile
    return [
        ProgressCallback(session.folder.progress, tokens=lambda: meter.tokens),
        TrackerCallback(tracker),
        KeepCallback(session.keep_rule),
        *([PageCallback(page)] if page is not None else []),
        *([ProfileCallback(session.folder.trace, session.placement.device)] if profiles else []),
        *_build_pruning(),
    ]


def build_step(session: Session, model: PreTrainedModel | PeftModel) -> FastStep:
    """Returns the fast training step of a model; where it cannot share prompts, the session's rows do not, either."""
    config = session.config
    step = FastStep(
        model,
        config.trainer,
        config.quantization,
        session.placement,
        _limits(session),
        session.objective,
        session.reference_weights,
    )
    if session.data.shares_prompts and not step.shares_prompts:
        _separate_prompts(session, step)
    return step


def _limits(session: Session) -> Packs | None:
    packed, width = session.data.packed, session.config.data.pack_width
    if session.data.stream is not None and width:
        return Packs(width, MOST_ROWS, min(session.config.data.longest_row or width, width))
    return Packs(packed.most_cells or width, packed.most_rows, packed.longest_row) if packed and width else None


def _separate_prompts(session: Session, step: FastStep) -> None:
    """Lays the session's rows out for a step that computes a prompt with each of its answers; says so of packs."""
    packed = session.data.packed
    session.separate_prompts()
    step.take_packs(_limits(session))
    if packed is not None and session.data.packed is not None:
        state = step.parts["fused_attention"]
        reason = "this architecture reads other tokens not by attention alone" if state == ON else state
        log.warning(
            "data.packing=true: both answers of a pair have a prompt of their own, because trainer.fused_attention "
            "cannot share it (%s): %s packs instead of %s, %s",
            reason,
            f"{len(session.data.packed):,}",
            f"{len(packed):,}",
            session.length,
        )


def _say_sharing(session: Session) -> None:
    """Prints what is saved where the answers of a pair share their prompt."""
    data = session.data
    if data.train is None or not data.shares_prompts:
        return
    shared, tokens = int(column(data.train, "shared").sum()), int(column(data.train, "length").sum())
    saved = f"{shared:,} of {tokens:,} tokens a pass are not computed again"
    console.say_rows([("prompts", f"once for both answers of a pair: {saved} ({shared / tokens:.0%})")])


def _say_step(step: FastStep, budget: Budget | None) -> None:
    """Prints which parts of the fast step are on, and whether decoded experts are kept."""
    if not step.is_active:
        return
    text = str(step)
    if step.packed_experts:
        text += (
            "; experts decoded in each pass: no trainer.memory_budget says that memory is free"
            if budget is None
            else f"; decoded experts of {budget.choose().kept} of {step.packed_experts} layers kept"
        )
    console.say_rows([("fast step", text)])


def build_budget(
    session: Session,
    step: FastStep,
    *,
    max_length: int,
    most_targets: int | None = None,
    memory: PeakMemory | None = None,
) -> Budget | None:
    """Returns what `trainer.memory_budget` allows for rows of up to `max_length` tokens.

    The loss counts at most `most_targets` of them; None: all. `memory` follows that of the run.
    """
    requested, device = session.config.trainer.memory_budget, session.placement.device
    if requested is None or device.type != "cuda":
        return None
    shape = read_shape(session.model_config.get_text_config().to_dict(), f"trainer.memory_budget={requested}")
    is_fast = step.parts["fused_linear"] == "on" and step.parts.get("fused_experts", "on") == "on"
    kind = PlanStep.fast if is_fast else PlanStep.plain
    setup = replace(read_setup(session.config, shape), step=kind, length=max_length, most_targets=most_targets)
    setup = replace(setup, attended=session.data.attended)
    if session.waiting_experts is not None:
        setup = replace(setup, waiting=session.waiting_experts)

    def added(checkpointed: int, offloaded: int, rows: int, length: int) -> float:
        plan = replace(setup, checkpointed=checkpointed, offloaded=offloaded, rows=rows, length=length)
        return Ledger(shape, plan).added + step.extra_bytes(rows, length)

    ledger = Ledger(shape, setup)
    formula = Formula(
        ledger.at_start, setup.accumulates, added, setup.rows, max_length, paged=ledger.optimizer[1],
        mixed=min(ledger.can_be_kept, step.packed_experts), decoded=ledger.decoded_experts,
        optimizer=ledger.added_by_optimizer,
    )  # fmt: skip
    cap = parse_size(requested)
    free = free_memory(device)
    limit = min(cap, free) if cap is not None else free
    return Budget(formula, len(step.layers), limit * (1 - FRAGMENTS), cap, device, memory)


def _build_meter(session: Session, operations: Operations | None, peak: PeakMemory) -> Meter:
    device = session.placement.device
    return Meter(
        device,
        peak_memory_gb=peak.gb,
        operations=operations.total if operations is not None else None,
        output=operations.output if operations is not None else 0.0,
        rate=matrix_rate(device, session.placement.compute_dtype),
    )


def _count_operations(session: Session, model: PreTrainedModel | PeftModel) -> Operations | None:
    """Returns what training takes a token; None for an architecture whose matrices are not known."""
    try:
        shape = read_shape(session.model_config.get_text_config().to_dict(), f"model.name={session.config.model.name}")
    except DataError as error:
        log.info("model FLOP utilisation is not known: %s", error)
        return None
    trained = 0
    if session.config.lora.enabled:
        count = adapters.count_parameters(model)
        trained = active_adapters(shape, count.trainable, count.on_experts)
    return count_operations(shape, trained)


def _build_pruning() -> list[Any]:
    """Returns what reports to the search that this run is a trial of, if that ends trials early."""
    if (link := os.environ.get(TRIAL_VARIABLE)) is None:
        return []
    from qlora.runtime.search_trial import TrialLink  # Optuna is an extra
    from qlora.training.pruning import PruningCallback

    return [PruningCallback(TrialLink.from_text(link))]
