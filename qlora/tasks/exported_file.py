"""Writes the GGUF file of a model or of an adapter, and says how it is served."""

from __future__ import annotations

import contextlib
import copy
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from qlora.adapters.adapted import split_adapter
from qlora.config.paths import short_path
from qlora.config.schema import ComputeDtype, Config, GgufType
from qlora.errors import DataError, ResourceError
from qlora.export.adapter_file import AdapterFile
from qlora.export.architectures import find_architecture
from qlora.export.model_file import ModelFile, end_ids_of
from qlora.export.quantize import find_quantizer
from qlora.export.vocabulary import Vocabulary
from qlora.models.model_files import locate
from qlora.models.weight_files import Checkpoint, ModelNames, local_files
from qlora.reporting.modelfile import find_form, modelfile_lines
from qlora.runtime import console
from qlora.runtime.atomic_files import write_file, write_text
from qlora.runtime.disk_space import is_disk_full
from qlora.tasks.measured import load_model
from qlora.tasks.merge import build_merge, check_quantization
from qlora.tasks.merged_model import REPORT
from qlora.tasks.protocol import TaskJob

BYTES = {GgufType.f16: 2.0, GgufType.q8_0: 34 / 32, GgufType.q4_k_m: 2.0 + 0.62}
"""The bytes a weight while the file is written; q4_k_m is quantized from a file of float16."""


@dataclass
class Written:
    """What was written, and what is said of it."""

    file: Path
    base: Path | None = None
    """The base that an adapter is added to."""
    modelfile: Path | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_model(job: TaskJob, path: Path) -> Written:
    """Writes base and adapter, a whole model, or an untuned base as one file."""
    session = job.session
    adapter, full = session.trained
    key = "export.format=gguf"
    find_architecture(session.model_config.get_text_config(), key)  # before anything is merged
    job.create_folder()
    with _made_room(path):
        if full is not None:
            return _write_folder(job, full, path, key)
        if adapter is None:
            return _write(job, _base_file(job, session.tokenizer, path.stem, key), path)
        check_quantization(job, adapter)
        merge = build_merge(job, _exactly(job.config))
        _check_tokenizer(job, merge.tokenizer, key)
        folder = job.folder.path / "export.partial"
        try:
            comparison = merge.run(folder, job.folder.path / REPORT)
            written = _write_folder(job, folder, path, key)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        written.metrics |= {f"merge_{name}": comparison[name] for name in ("kl_mean", "kl_max", "top1_agreement")}
        return written


def _exactly(config: Config) -> Config:
    """Returns a config whose merge rounds nothing before the file does."""
    if config.merge.dtype is not ComputeDtype.auto:
        return config
    exact = copy.copy(config)
    exact.merge = replace(config.merge, dtype=ComputeDtype.fp32)
    return exact


def _check_tokenizer(job: TaskJob, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Raises `DataError` for a tokenizer that llama.cpp does not know, before anything is merged."""
    from qlora.export.vocabulary import read_vocabulary

    read_vocabulary(tokenizer, len(tokenizer), key)


def _write_folder(job: TaskJob, folder: Path, path: Path, key: str) -> Written:
    """Writes the model of a folder, with its tokenizer, template and end tokens."""
    trust = job.config.model.trust_remote_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    ends = end_ids_of(tokenizer, _saved_ends(folder))
    file = ModelFile(
        Checkpoint(folder), ModelNames(config, trust_remote_code=trust), config, tokenizer, ends, path.stem, key
    )
    return _write(job, file, path)


def _base_file(job: TaskJob, tokenizer: PreTrainedTokenizerBase, title: str, key: str) -> ModelFile:
    """Returns what the untuned base becomes, as its files hold it."""
    session, model = job.session, job.config.model
    if session.has_random_weights or model.new_tokens:
        raise DataError(
            f"{key}: the base has no files of the weights that the config describes; use export.format=gguf"
        )
    folder = local_files(locate(model.name), revision=model.revision, cache_dir=model.cache_dir)
    ends = end_ids_of(tokenizer, _saved_ends(folder), session.end_id)
    names = ModelNames(session.model_config, trust_remote_code=model.trust_remote_code)
    return ModelFile(session.tensors(), names, session.model_config, tokenizer, ends, title, key)


def _saved_ends(folder: Path) -> int | list[int] | None:
    if not (folder / "generation_config.json").is_file():
        return None
    ends: int | list[int] | None = GenerationConfig.from_pretrained(folder).eos_token_id
    return ends


def _write(job: TaskJob, file: ModelFile, path: Path) -> Written:
    kind = job.config.export.type
    vocabulary = file.check()
    _check_space(path, int(file.names.count * BYTES[kind]))
    count = sum(1 for _ in file.gguf_tensors())
    with console.progress("writing", count) as update:
        if kind is GgufType.q4_k_m:
            half = path.with_name(f".{path.name}.f16.tmp")
            try:
                file.write(half, GgufType.f16, update)
                write_file(path, lambda target: find_quantizer()(half, target))
            finally:
                half.unlink(missing_ok=True)
        else:
            file.write(path, kind, update)
    written = Written(path)
    written.commands = [
        shlex.join(["llama-server", "-m", short_path(path), "--jinja"]),
        *_verifying(job, f"verify.path={short_path(path)}"),
    ]
    _write_modelfile(job, file, vocabulary, written)
    return written


def _verifying(job: TaskJob, *overrides: str) -> list[str]:
    name = job.config.adapter
    if name in (None, "none"):
        return []
    return [shlex.join(["qlora", "verify", short_path(Path(str(name))), "verify.engine=llama-cpp", *overrides])]


def _write_modelfile(job: TaskJob, file: ModelFile, vocabulary: Vocabulary, written: Written) -> None:
    """Writes a `Modelfile` beside the file, where its template can be said in Ollama's language."""
    name = re.sub(r"[^a-z0-9._-]+", "-", written.file.stem.lower()).strip("-._") or "model"
    form: Any = find_form(file.tokenizer)
    lines: Sequence[str] | str
    if vocabulary.segments is not None and vocabulary.segments.scheme == "steps":
        lines = (
            "what the tokenizer does to a text before it splits it stands in the file's chat template, which Ollama "
            "does not read"
        )
    elif isinstance(form, str):
        lines = form
    else:
        lines = modelfile_lines(file.tokenizer, form, job.config.generation, end_ids=file.end_ids, name=name,
                                source=f"./{written.file.name}")  # fmt: skip
    if isinstance(lines, str):
        written.notes.append(f"no Modelfile for Ollama: {lines}")
        return
    is_named = job.config.export.path is not None  # maybe beside files of other models
    written.modelfile = written.file.with_name(f"{written.file.stem}.Modelfile" if is_named else "Modelfile")
    write_text(written.modelfile, "\n".join(lines) + "\n")
    written.commands.insert(1, shlex.join(["ollama", "create", name, "-f", short_path(written.modelfile)]))


def write_adapter(job: TaskJob, path: Path) -> Written:
    """Writes the LoRA matrices, and the base beside them where `export.base` asks for it."""
    session, export, key = job.session, job.config.export, "export.format=gguf-adapter"
    find_architecture(session.model_config.get_text_config(), key)
    job.create_folder()
    model = load_model(job)
    assert isinstance(model, PeftModel)
    file = AdapterFile(split_adapter(model), session.model_config, path.stem)
    del model
    file.check()
    written = Written(path)
    with _made_room(path):
        base = path.with_name(f"{path.stem}-base.gguf")
        if export.base:
            tokenizer = session.tokenizer
            tokenizer.chat_template = session.chat_encoder.writer.template.text
            written = _write(job, _base_file(job, tokenizer, base.stem, key), base)
            written.base, written.file = base, path
        with console.progress("writing", 2 * len(file.adapted.layers)) as update:
            file.write(path, export.type, update)
    serving = f"verify.path={short_path(base)}", f"verify.lora={short_path(path)}"
    written.commands = [
        shlex.join(["llama-server", "-m", short_path(base), "--lora", short_path(path), "--jinja"]),
        *_verifying(job, *serving),
    ]
    if written.modelfile is not None:
        write_text(written.modelfile, written.modelfile.read_text(encoding="utf-8") + f"ADAPTER ./{path.name}\n")
        name = path.stem
        written.commands.insert(1, shlex.join(["ollama", "create", name, "-f", short_path(written.modelfile)]))
    if job.config.quantization.bits < 16:
        written.notes.append(
            "llama.cpp adds the adapter to the base in 16 or 8 bits, not to the quantized weights that it was trained "
            "on; qlora verify measures what that changes"
        )
    return written


def _check_space(path: Path, needed: int) -> None:
    """Raises `ResourceError` if the file does not fit on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise ResourceError(
            f"task=export needs {needed / 1e9:.3g} GB in {path.parent}, where {free / 1e9:.3g} GB are free; free some, "
            "or choose another disk with export.path=FILE.gguf"
        )


@contextlib.contextmanager
def _made_room(path: Path) -> Iterator[None]:
    """Says what a full disk means for the file."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error) and not isinstance(error, DataError):
            raise ResourceError(
                f"the disk of {path.parent} became full while {path.name} was written, and nothing of it is left; free "
                "some space, or choose another disk with export.path=FILE.gguf"
            ) from error
        raise
