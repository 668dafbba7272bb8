"""Writes the model of a base and its adapter, compares it with them, and keeps it only if they answer alike."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora.adapters.adapted import split_adapter
from qlora.adapters.merge_tensors import Adapted, Merger
from qlora.config.paths import short_path
from qlora.config.schema import ComputeDtype, Config, MergeBase
from qlora.errors import ResourceError, RunError
from qlora.evaluation.parity import Parity, compare, compare_records, record
from qlora.models.model_files import locate
from qlora.models.tokenizer import save_tokenizer
from qlora.models.weight_files import ModelNames, Tensors, local_files
from qlora.quantization.method import QuantizationMethod, find_method
from qlora.reporting.manifest import write_json
from qlora.reporting.modelfile import find_form, write_modelfile
from qlora.runtime import console
from qlora.runtime.atomic_files import replace_folder, restore_folder
from qlora.runtime.device import DTYPES, Placement, peak_memory_gb
from qlora.runtime.disk_space import is_disk_full
from qlora.text import format_percent, parse_size
from qlora.upstream.peft import base_of

PROMPT_TOKENS = 256
"""The length that each prompt of the comparison is cut to."""
LIMITS = {MergeBase.dequantized: 1e-3, MergeBase.original: 0.1}
"""The mean KL divergence, in nats a token, that is accepted where `merge.max_kl` is unset."""
INT8_LIMIT = 1e-2
"""The same for `dequantized` 8-bit weights: LLM.int8() rounds the activations too, which no merged model does."""
REPORT = "merge_report.json"


@dataclass(frozen=True)
class Merge:
    """One merging: where the parts come from, and what they are compared by."""

    config: Config
    load: Callable[[], PeftModel]
    """Loads the base with its adapter, as they were trained."""
    tensors: Callable[[], Tensors]
    """Opens the base's weights."""
    model_config: Any
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Sequence[int]]
    """Token ids of real rows."""
    placement: Placement
    name: str
    """The run's, by which a server shall know the model."""

    def run(self, target: Path, report: Path) -> dict[str, Any]:
        """Writes the model to the folder `target` and the comparison to `report`, and returns the comparison.

        The previous files of `target` stay until the new model is whole and close enough. Raises `RunError`, and leaves
        only the report, where it is not close enough; raises `ResourceError` where the disk is too small.
        """
        started = time.monotonic()
        names = ModelNames(self.model_config, trust_remote_code=self.config.model.trust_remote_code)
        self._check_space(target.parent, names)
        with _whole_or_not_at_all(target) as partial:
            reference = partial / ".reference"
            reference.mkdir()
            adapted, rounding = self._take_reference(reference, partial)
            limit = self._limit(rounding)
            merger = self._merger(names, adapted)
            size = parse_size(self.config.merge.max_shard_size)
            assert size is not None  # the schema lets no other text through
            with console.progress("merging", len(merger.parts)) as update:
                merger.write(partial, max_shard_size=size, on_progress=update)
            modelfile = self._write_tokenizer(partial)
            parity = self._compare(partial, reference)
            shutil.rmtree(reference)
            comparison = {
                "accepted": parity.kl_mean <= limit,
                "adapter": self.config.adapter,
                "model": self.config.model.name,
                "base": self.config.merge.base.value,
                "dtype": _name(self.dtype),
                "max_kl": limit,
                "computing_kl": rounding,
                **asdict(parity),
                "quantization": _summary(merger.errors),
                "weights_gb": merger.bytes / 1e9,
                "files": len(list(partial.glob("*.safetensors"))),
                "modelfile": modelfile,
                "seconds": time.monotonic() - started,
                "peak_memory_gb": peak_memory_gb(self.placement.device),
            }
            write_json(report, comparison)
            if not comparison["accepted"]:  # also where it is NaN
                raise RunError(self._refusal(parity, merger.errors, limit))
            write_json(partial / REPORT, comparison)
        return comparison

    def print_summary(self, folder: Path, comparison: dict[str, Any], files: list[tuple[str, str]]) -> None:
        """Prints how near the merged model is, and the commands that serve it."""
        rows: list[tuple[str, float | None, float | None, str]] = [
            ("kl_divergence", None, comparison["kl_mean"], f"nats a token, at most {comparison['max_kl']:.2g}"),
            ("same_likeliest_token", None, comparison["top1_agreement"], f"share of {comparison['tokens']:,} tokens"),
        ]
        console.summary(
            f"merged: {short_path(folder)}",
            rows,
            [],
            [(name, short_path(path)) for name, path in files],
            self._serving(folder, comparison["modelfile"] is None),
        )
        if comparison["modelfile"] is not None:
            console.say(f"  no Modelfile for Ollama: {comparison['modelfile']}")

    def _serving(self, folder: Path, ollama: bool) -> list[str]:
        target, modelfile = short_path(folder), short_path(folder / "Modelfile")
        example = '[{"role": "user", "content": "Hello!"}]' if self.tokenizer.chat_template else '"Hello"'
        python = f'from transformers import pipeline; print(pipeline("text-generation", "{target}")({example}))'
        return [
            shlex.join(["python", "-c", python]),
            shlex.join(["vllm", "serve", target, "--dtype", str(self.dtype).removeprefix("torch.")]),
            *([shlex.join(["ollama", "create", self.served_name, "-f", modelfile])] if ollama else []),
        ]

    @property
    def served_name(self) -> str:
        """The run's name in the signs that Ollama takes."""
        return re.sub(r"[^a-z0-9._-]+", "-", self.name.lower()).strip("-._") or "model"

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the merged weights."""
        requested = self.config.merge.dtype
        return self.placement.compute_dtype if requested is ComputeDtype.auto else DTYPES[requested]

    @property
    def _method(self) -> QuantizationMethod:
        return find_method(self.config.quantization)

    @property
    def _is_16_bit(self) -> bool:
        return not self._method.is_quantized and self.placement.param_dtype is not torch.float32

    def _limit(self, rounding: float | None) -> float:
        """Returns the mean KL divergence that is accepted, in nats a token.

        Unset, it is at least twice what `rounding` in 16 bits does to the adapter on its base itself.
        """
        merge = self.config.merge
        if merge.max_kl is not None:
            return merge.max_kl
        rounds = self._method.rounds_activations and merge.base is MergeBase.dequantized
        limit = INT8_LIMIT if rounds else LIMITS[merge.base]
        return max(limit, 2 * (rounding or 0.0))

    def _check_space(self, folder: Path, names: ModelNames) -> None:
        """Raises `ResourceError` if the weights and what they are compared with do not fit on the disk."""
        vocabulary = max(len(self.tokenizer), self.model_config.get_text_config().vocab_size)
        compared = sum(map(len, self.prompts)) * vocabulary * (torch.float32.itemsize + self.dtype.itemsize)
        needed, free = names.count * self.dtype.itemsize + compared, shutil.disk_usage(folder).free
        if needed > free:
            raise ResourceError(
                f"task=merge needs {needed / 1e9:.3g} GB in {folder}, where {free / 1e9:.3g} GB are free; free some, "
                "or choose another folder with hydra.run.dir=FOLDER"
            )

    def _take_reference(self, folder: Path, partial: Path) -> tuple[Adapted, float | None]:
        """Loads base and adapter, notes in float32 what they answer, writes their settings, and releases them.

        Returns the parts, and the KL divergence that computing in the precision of the merged model alone makes (None:
        unknown, or no rounding). With a base of 16 bits, which would take twice its memory in float32, the reference
        is what they answer as they are.
        """
        model = self.load().eval()
        adapted = split_adapter(model)
        _write_settings(base_of(model), partial, self.dtype)
        console.say(f"noting what the adapter on its base answers to {len(self.prompts)} prompts")
        device, rounding = self.placement.device, None
        if self._is_16_bit:
            with self.placement.autocast():
                record(model, self.prompts, folder, device=device)
        else:
            rounded = folder / "rounded"
            if self.dtype is not torch.float32:
                rounded.mkdir()
                self._method.prepare(model, self.dtype)
                with torch.autocast(device.type, dtype=self.dtype):
                    record(model, self.prompts, rounded, device=device)
            self._method.prepare(model.float(), torch.float32)
            record(model, self.prompts, folder, device=device)
            if rounded.exists():
                rounding = compare_records(rounded, folder, device=device).kl_mean
        del model
        gc.collect()
        if device.type != "cpu":
            getattr(torch, device.type).empty_cache()
        return adapted, rounding

    def _merger(self, names: ModelNames, adapted: Adapted) -> Merger:
        return Merger(self.tensors(), names, adapted, self.config.merge.base, self.dtype, self.placement)

    def _write_tokenizer(self, folder: Path) -> str | None:
        """Writes tokenizer, chat template and `Modelfile`; returns why there is no Modelfile, or None."""
        save_tokenizer(self.tokenizer, folder)
        for path in self._copied_files():
            shutil.copyfile(path, folder / path.name)
        form = find_form(self.tokenizer)
        if isinstance(form, str):
            return form
        settings = GenerationConfig.from_pretrained(folder)
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        end_ids = [token for token in (*ends, self.tokenizer.eos_token_id) if token is not None]
        written = write_modelfile(
            folder, self.tokenizer, form, self.config.generation, end_ids=end_ids, name=self.served_name
        )
        return written if isinstance(written, str) else None

    def _copied_files(self) -> list[Path]:
        """Returns the base's files that are part of the merged model as they are."""
        model, copied = self.config.model, list[Path]()
        if model.tokenizer is not None and not model.trust_remote_code:
            return copied
        base = local_files(locate(model.name), revision=model.revision, cache_dir=model.cache_dir)
        # Converters to GGUF read it; transformers does not save it again.
        copied += [base / "tokenizer.model"] if model.tokenizer is None else []
        copied += base.glob("*.py") if model.trust_remote_code else []
        return [path for path in copied if path.is_file()]

    def _compare(self, folder: Path, reference: Path) -> Parity:
        """Loads the written model by transformers alone, and compares what it answers with the reference."""
        console.say("comparing the merged model with the adapter on its base")
        options: dict[str, Any] = {}
        if self.placement.device.type != "cpu":  # what does not fit on the devices runs from memory or the disk
            options = {"device_map": "auto", "offload_folder": str(reference / "offload")}
        if self.config.model.attn_implementation is not None:
            options["attn_implementation"] = self.config.model.attn_implementation
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=self.dtype,
            use_safetensors=True,
            trust_remote_code=self.config.model.trust_remote_code,
            **options,
        )
        return compare(model.eval(), self.prompts, reference, device=self.placement.device)

    def _refusal(self, parity: Parity, errors: dict[str, float], limit: float) -> str:
        apart = (
            f"merge.base={self.config.merge.base.value}: the merged model answers otherwise than the adapter on its "
            f"base (KL divergence {parity.kl_mean:.2g} nats a token, above merge.max_kl={limit:.2g})"
        )
        if not math.isfinite(parity.kl_mean):
            return f"{apart}: its probabilities are NaN in {_name(self.dtype)}; use another merge.dtype"
        accept = f"accept it with merge.max_kl={1.1 * parity.kl_mean:.2g}"
        if errors and self.config.merge.base is MergeBase.original:
            kind = self._method.data_type(self.config.quantization)
            worst = max(errors, key=lambda name: errors[name])
            average, highest = (format_percent(error, 2) for error in (mean(errors.values()), errors[worst]))
            return (
                f"{apart}: the 16-bit weights are not the {kind} ones that it was trained on, which differ from them "
                f"by {average} on average, most in {worst} ({highest}); use "
                f"merge.base=dequantized, or {accept}"
            )
        if self._method.rounds_activations:
            return f"{apart}: LLM.int8() rounds the activations too, which no merged model does; {accept}"
        if self._is_16_bit:
            computed = _name(self.placement.compute_dtype)
            return (
                f"{apart}: the adapter on its base computes in {computed}, whose rounding can be all of that; {accept}"
            )
        if self.dtype is not torch.float32:
            return f"{apart}: rounding its weights to {_name(self.dtype)} does that; use merge.dtype=fp32, or {accept}"
        steps = [after - previous for previous, after in pairwise([0.0, *parity.layers])]
        target = steps.index(max(steps))
        where = f"layer {target - 1}" if target else "the embedding"
        return f"{apart}: most of it arises in {where}; serve the adapter on its base instead, or {accept}"


def _write_settings(base: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Writes the config of the plain model and how it generates, which includes the template's end token."""
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype, config.architectures = dtype, [type(base).__name__]
    config.save_pretrained(folder)
    if (generation := copy.deepcopy(base.generation_config)) is None:
        return
    try:
        generation.save_pretrained(folder)
    except ValueError:  # published settings may name a temperature and not sample, which is not to be saved
        generation.do_sample = True
        generation.save_pretrained(folder)


@contextlib.contextmanager
def _whole_or_not_at_all(target: Path) -> Iterator[Path]:
    """Yields a new folder beside `place` to write to, and puts it there at the end; nothing is left after a failure."""
    restore_folder(target)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        replace_folder(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise ResourceError(
                f"the disk of {target.parent} became full while the model was written, and nothing of it is left; free "
                "some space, or choose another folder with hydra.run.dir=FOLDER"
            ) from error
        raise


def _summary(errors: dict[str, float]) -> dict[str, Any]:
    """Returns the mean of what quantization changed, as a share of a layer's weight, and the five largest."""
    worst = sorted(errors, key=lambda name: errors[name], reverse=True)[:5]
    return {"mean": mean(errors.values()), "largest": {name: errors[name] for name in worst}} if errors else {}


def _name(dtype: torch.dtype) -> str:
    return next(name.value for name, known in DTYPES.items() if known is dtype)
