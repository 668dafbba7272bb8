"""The fingerprint of a base: of its weights, wherever and however they are saved."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from qlora.config.schema import Weights
from qlora.errors import DamagedFile, DataError
from qlora.models.json_files import read_object
from qlora.models.model_files import EMBEDDED
from qlora.runtime import console
from qlora.runtime.atomic_files import read_json, write_text
from qlora.runtime.run_folder import RunFolder

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
BASE_FILE = "base.json"
"""Says in an adapter's folder which base it belongs to."""

STORED, RANDOM = "weights-1", "random-1"
"""The rules that a fingerprint is made by, and begins with: one by another rule says nothing here."""
LENGTH = 64
"""Characters of a fingerprint."""
BLOCKS, BLOCK = 8, 32
"""A tensor is sampled in blocks of consecutive values, spread evenly from its first value to its last."""
LAYER = re.compile(r"[^.]+\.\d+\..+")
COMPUTED = re.compile(r"(\.(attn|attention)\.(masked_)?bias|\.inv_freq)$")
"""Buffers that follow from a model's config: older versions of transformers stored them with the weights."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Of the names in safetensors; any other is sampled byte by byte."""


@dataclass(frozen=True)
class Base:
    """The base that an adapter belongs to."""

    name: str
    """`model.name`; "": nothing says it."""
    revision: str | None = None
    """Of a model on the hub the commit."""
    fingerprint: str | None = None
    """`RULE:HEX` of its weights; None: nothing says it."""
    random: dict[str, Any] | None = None
    """With `model.weights=random` all that decides the weights, by the full keys of the config."""
    rope_scaling: dict[str, Any] | None = None
    """What `model.rope_scaling` says; None: the model's own rotary positions."""

    def __post_init__(self) -> None:
        texts = (self.revision, self.fingerprint)
        if (
            not all(isinstance(text, str | None) for text in texts)
            or not isinstance(self.name, str)
            or not isinstance(self.random, dict | None)
            or not isinstance(self.rope_scaling, dict | None)
        ):
            raise TypeError("a value of another type than it has")


@dataclass(frozen=True)
class Difference:
    """How two bases differ, or may differ."""

    what: str
    remedy: str
    is_certain: bool = True
    """Whether their weights differ; False: there is no fingerprint to compare."""


def fingerprint_weights(files: Iterable[Path]) -> str:
    """Returns the fingerprint of the weights in safetensors files; headers and 256 values of each tensor are read.

    It follows from names, shapes and values of the tensors alone. A name counts from the numbered layer on, so that
    wrappers (`model.`, `transformer.`) do not matter, and a matrix outside of the layers has none, because tied
    embeddings lie in files under either name or both. A value counts as a float64: a dtype that holds all values of
    another makes no difference.
    """
    total, files, digests = hashlib.sha256(), list(files), set[bytes]()
    with console.progress("hashing the base", len(files)) as update:
        for number, file in enumerate(files, 1):
            digests.update(_digest_tensors(file))
            update(number)
    for digest in sorted(digests):
        total.update(digest)
    return _name(STORED, total)


def fingerprint_random(settings: Mapping[str, Any]) -> str:
    """Returns the fingerprint of the weights that `settings` decide."""
    return _name(RANDOM, hashlib.sha256(json.dumps(settings, sort_keys=True).encode()))


def _name(rule: str, digest: Any) -> str:
    return f"{rule}:{digest.hexdigest()}"[:LENGTH]


def _digest_tensors(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        length = int.from_bytes(read(0, 8), "little")
        for name, entry in json.loads(read(8, length)).items():
            if name == "__metadata__" or COMPUTED.search(name):
                continue
            dtype = DTYPES.get(entry["dtype"], torch.uint8)
            (begin, end), size = entry["data_offsets"], dtype.itemsize
            blocks = _choose_blocks((end - begin) // size)
            sample = b"".join(read(8 + length + begin + first * size, count * size) for first, count in blocks)
            values = torch.frombuffer(bytearray(sample), dtype=dtype).double() if sample else torch.empty(0)
            label = f"{_core_name(name, entry['shape'])} {entry['shape']} "
            yield hashlib.sha256(label.encode() + values.numpy().astype("<f8").tobytes()).digest()


def _choose_blocks(count: int) -> list[tuple[int, int]]:
    """Returns (first value, number of values) of the blocks that are read of a tensor."""
    if count <= BLOCKS * BLOCK:
        return [(0, count)]
    return [(index * (count - BLOCK) // (BLOCKS - 1), BLOCK) for index in range(BLOCKS)]


def _core_name(name: str, shape: list[int]) -> str:
    if (match := LAYER.search(name)) is not None:
        return match[0]
    return "" if len(shape) > 1 else ".".join(name.split(".")[-2:])


def find_difference(trained: Base, now: Base) -> Difference | None:
    """Returns how the base `now` differs from the one `trained`; None: it does not."""
    if not (_is_comparable(trained) and _is_comparable(now)):
        return _compare_names(trained, now)
    if trained.fingerprint == now.fingerprint:
        return _compare_scaling(trained.rope_scaling, now.rope_scaling)
    if trained.random is not None or now.random is not None:
        return _compare_random(trained, now)
    hashes = f"fingerprint {_shorten(now)}, not {_shorten(trained)}"
    revision = f"model.revision={trained.revision or 'null'}"
    if trained.name != now.name:
        extra = "" if trained.revision == now.revision else f", with {revision}"
        what = f"model.name={now.name}, whose weights are others ({hashes}): it was trained on {trained.name}"
        return Difference(what, f"give that base as model.name{extra}")
    what = f"model.name={now.name}, whose weights have changed since the training ({hashes})"
    return Difference(what, f"set {revision}" if trained.revision != now.revision else "restore the previous files")


def _compare_scaling(trained: dict[str, Any] | None, now: dict[str, Any] | None) -> Difference | None:
    if trained == now:
        return None
    former, current = (json.dumps(scaling).replace('"', "") for scaling in (trained, now))
    return Difference(
        f"model.rope_scaling={current}: it was trained with {former}", f"set model.rope_scaling='{former}'"
    )


def _is_comparable(base: Base) -> bool:
    return base.fingerprint is not None and base.fingerprint.partition(":")[0] in (STORED, RANDOM)


def _shorten(base: Base) -> str:
    return str(base.fingerprint).partition(":")[2][:8]


def _compare_random(trained: Base, now: Base) -> Difference:
    """Says how random weights differ from others."""
    if trained.random is None:
        what = f"model.weights=random: it was trained on the weights of {trained.name}"
        return Difference(what, f"set model.weights=pretrained model.name={trained.name}")
    settings = now.random or {**trained.random, "model.weights": Weights.pretrained.value}
    changed = [key for key in {**trained.random, **settings} if trained.random.get(key) != settings.get(key)]
    values = {key: trained.random.get(key) for key in changed}
    remedy = " ".join(f"{key}={'null' if value is None else value}" for key, value in values.items())
    return Difference("the config: it was trained on a base with other random weights", f"set {remedy}")


def _compare_names(trained: Base, now: Base) -> Difference | None:
    """Says what is not known where one of the bases has no fingerprint that can be compared."""
    if trained.fingerprint is None and _is_same_name(trained.name, now.name):
        return None
    known = f"it was trained on {trained.name}" if trained.name else "nothing says what it was trained on"
    what = f"model.name={now.name}, for there is no fingerprint of its weights to compare: {known}"
    return Difference(what, "make sure that the weights are the same", is_certain=False)


def _is_same_name(first: str, second: str) -> bool:
    paths = [Path(EMBEDDED.get(name, name)).expanduser() for name in (first, second)]
    return first == second or (paths[0].is_dir() and paths[0].resolve() == paths[1].resolve())


def write_base(base: Base, folder: Path) -> None:
    """Writes into an adapter's folder which base it belongs to."""
    write_text(folder / BASE_FILE, json.dumps(asdict(base), indent=2, ensure_ascii=False) + "\n")


def read_base(adapter: Path) -> Base:
    """Returns the base that an adapter belongs to: by its own folder, its run's manifest, or the name that PEFT stores.

    Raises `DataError` for a damaged file.
    """
    key = f"adapter={adapter}"
    if (path := adapter / BASE_FILE).is_file():
        saved = read_object(path, key)
        return Base(**{field.name: saved[field.name] for field in fields(Base) if field.name in saved})
    run = RunFolder(adapter.parent.parent if adapter.parent.name == "checkpoints" else adapter.parent)
    is_of_run = adapter.parent == run.checkpoints or adapter == run.adapter
    if is_of_run and (base := read_run_base(run)) is not None:
        return base
    return Base(read_object(adapter / ADAPTER_FILES[0], key).get("base_model_name_or_path") or "")


def read_run_base(run: RunFolder) -> Base | None:
    """Returns the base of the training in a run's folder, as its manifest says; None: there is none.

    Runs of older versions have a digest of files there, which cannot be compared, and `drawn.json` beside it. Raises
    `DataError` for a damaged manifest.
    """
    try:
        if (manifest := read_json(run.manifest)) is None:
            return None
        model, config = manifest["model"], manifest["config"]["model"]
        settings = model.get("random") or read_json(run.path / "drawn.json")
        digest = model.get("fingerprint") if settings is None else fingerprint_random(settings)
        scaling = config.get("rope_scaling")
        return Base(model.get("name", config["name"]), model.get("revision"), digest, settings, scaling)
    except (DamagedFile, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = error.reason if isinstance(error, DamagedFile) else f"{type(error).__name__}: {error}"
        path = error.path if isinstance(error, DamagedFile) else run.manifest
        raise DataError(
            f"{path} is damaged ({reason}), and nothing else says which base the run "
            "was trained on; copy the run again, or choose another folder"
        ) from error


def adapter_digest(folder: Path) -> str:
    """Returns the SHA-256 of an adapter's settings and weights."""
    digest = hashlib.sha256()
    for name in ADAPTER_FILES:
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """Returns the SHA-256 of names, sizes and times of change of a model's files: its weights are too many to read."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(state).encode()).hexdigest()
