"""Loads and repairs tokenizers."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, dynamic_module_utils

from qlora.config.schema import ModelConfig
from qlora.errors import ConfigError, DataError, ResourceError, UserError, did_you_mean
from qlora.models.json_files import library_reads, unreadable
from qlora.models.json_shapes import TOKENIZER_JSON
from qlora.models.local_tokenizer import add_new_tokens
from qlora.models.model_files import EMBEDDED, TOKENIZER_FILES, check_tokenizer_folder, is_local, locate
from qlora.text import brief, brief_text
from qlora.upstream.huggingface_hub import read_cache_without_network, why_offline

log = logging.getLogger(__name__)

dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # nobody is asked whether code of a folder may run


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of `config` with its special tokens repaired and `model.new_tokens` added."""
    key = "model.tokenizer" if config.tokenizer else "model.name"
    source = locate(config.tokenizer or config.name, key)
    if not is_local(source):
        read_cache_without_network()
    tokenizer = _read(
        source,
        key,
        gated=config.gated,
        revision=config.revision if not config.tokenizer else None,
        cache_dir=config.cache_dir,
        trust_remote_code=config.trust_remote_code,
    )
    if config.new_tokens:
        added = add_new_tokens(tokenizer, config.new_tokens)
        log.info("model.new_tokens: %d of %d tokens are new", added, len(config.new_tokens))
    return tokenizer


def _read(source: str, key: str, *, gated: bool = False, **options: Any) -> PreTrainedTokenizerBase:
    """Loads a tokenizer by transformers and splits a text with it; raises `DataError` that names the damaged file."""
    if is_local(source):
        _check_class(check_tokenizer_folder(Path(source), key).get("tokenizer_class"), source, key)
    with library_reads(f"{key}={source}", lambda: _blame(Path(source))):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            if is_local(source) and "trust_remote_code" not in str(error):
                raise
            raise hub_error(key, source, error, gated=gated) from error
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"transformers finds no tokenizer there, but {brief(tokenizer)}")
        text = " ".join(filter(None, tokenizer.convert_ids_to_tokens([0, 1, 2])))  # which it must be able to split
        tokenizer.decode(tokenizer(text)["input_ids"])
    return tokenizer


def _check_class(name: Any, source: str, key: str) -> None:
    """Raises `DataError` where a tokenizer is said to be something else of transformers, which would be loaded."""
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    is_tokenizer = isinstance(kind, type) and (
        issubclass(kind, PreTrainedTokenizerBase) or "tokenization_" in kind.__module__
    )
    if kind is not None and not is_tokenizer:
        raise DataError(
            f"{key}={source}: tokenizer_config.json says tokenizer_class={name!r}, which is not a tokenizer; correct it"
        )


def _blame(folder: Path) -> str:
    """Returns the file of a tokenizer that a library fails on, as far as that is known."""
    if (path := folder / "tokenizer.json").is_file():
        try:
            with library_reads("", path.name):
                tokenizers.Tokenizer.from_file(str(path)).encode("")
        except UserError:
            return path.name
    names = [name for name in (*TOKENIZER_JSON, "tokenizer.model") if (folder / name).is_file()]
    return f"its tokenizer ({', '.join(names)})" if names else "its tokenizer"


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a tokenizer such that it splits every text alike when it is loaded again.

    transformers (5.23) forgets whether a LLaMA tokenizer is a legacy one, which puts a blank behind special tokens.
    """
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    tokenizer.save_pretrained(folder)


def load_saved_tokenizer(
    folder: Path, config: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer that a training saved in the folder of an adapter or a model; None: there is none.

    Its chat template may be another than that of `tokenizer`, which is what the base has now. Raises `DataError`
    where a token has another id, so that the weights would read other words than they were trained on.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    saved = _read(str(folder), "adapter", trust_remote_code=config.trust_remote_code)
    if difference := _find_difference(saved, tokenizer):
        base = f"model.tokenizer={config.tokenizer}" if config.tokenizer else f"model.name={config.name}"
        raise DataError(
            f"adapter={folder} was trained with another tokenizer than {base}: {difference}; give the base it was "
            f"trained on, or model.tokenizer={folder}"
        )
    return saved


def _find_difference(there: PreTrainedTokenizerBase, here: PreTrainedTokenizerBase) -> str | None:
    """Says in words which token differs between two tokenizers, the first one by its id; None: none does."""
    old, new = there.get_vocab(), here.get_vocab()
    for token in {there.pad_token, here.pad_token} - {None}:
        if token not in old or token not in new:  # a token for padding alone, which nothing reads
            old.pop(token, None), new.pop(token, None)
    if old != new:
        moved = {token for token, _ in old.items() ^ new.items()}
        token = min(moved, key=lambda token: (old.get(token, len(old)), token))
        return f"token {token!r} is {old.get(token, 'missing')} there and {new.get(token, 'missing')} here"
    for role in ("bos", "eos"):
        first, second = getattr(there, f"{role}_token"), getattr(here, f"{role}_token")
        if first != second:
            return f"its {role}_token is {first!r} there and {second!r} here"
    return None


def hub_error(key: str, source: str, error: Exception, *, gated: bool = False) -> UserError:
    """Returns one clear sentence for what the hub library says at length."""
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"{key}={source} comes with Python code, which is not run; read it, and if you trust it set "
            "model.trust_remote_code=true (and pin what you read with model.revision=COMMIT)"
        )
    if is_local(source):
        return unreadable(f"{key}={source}", "config.json" if key == "model.name" else "its tokenizer", error)
    near = did_you_mean(source, EMBEDDED)
    gate = "; its licence must be accepted on its hub page first (then HF_TOKEN or `hf auth login`)" if gated else ""
    offline = why_offline()
    reason = f"{offline or _first_line(error)}; check the name{'' if offline else ' and the network'}"
    return ResourceError(
        f"{key}={source}{near} is neither a folder here nor reachable on the hub: {reason}{gate}, or give a local "
        "folder with model.name=FOLDER"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return brief_text(lines[0]) if lines else type(error).__name__


def repair_special_tokens(tokenizer: PreTrainedTokenizerBase, model_config: Any) -> None:
    """Gives bos and eos back to tokenizers that lost them, such as early LLaMA conversions (empty strings).

    The ids come from the model's config, as the original script did it; healthy tokenizers stay as they are.
    """
    for role in ("bos", "eos"):
        token, token_id = getattr(tokenizer, f"{role}_token"), getattr(model_config, f"{role}_token_id", None)
        if token or not isinstance(token_id, int) or token_id < 0:
            continue
        name = tokenizer.convert_ids_to_tokens(token_id)
        if name:
            setattr(tokenizer, f"{role}_token", name)
            log.info(
                "the tokenizer has no %s token: taking %r (id %d) from the model's config",
                role,
                name,
                token_id,
            )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: ModelConfig, rows: int) -> dict[int, str]:
    """Returns the tokens, by their ids, that a base with embeddings for `rows` tokens has none for.

    Those of `model.new_tokens` get one, and no text needs to hold the special ones. Raises `DataError` if there are
    others: the tokenizer is another model's then.
    """
    vocabulary = tokenizer.get_vocab()
    beyond = {number: token for token, number in vocabulary.items() if number >= rows}
    beyond = {number: beyond[number] for number in sorted(beyond) if beyond[number] not in config.new_tokens}
    added = tokenizer.get_added_vocab()
    if ordinary := [token for token in beyond.values() if token not in added]:
        key = f"model.tokenizer={config.tokenizer}" if config.tokenizer else f"model.name={config.name}: its tokenizer"
        raise DataError(
            f"{key} has {len(vocabulary):,} tokens, and the base {config.name} has embeddings for {rows:,}, so it "
            f"belongs to another model ({ordinary[0]!r} is the first without one); give that of the "
            "base as model.tokenizer"
        )
    return beyond


def refuse_token(
    tokenizer: PreTrainedTokenizerBase, config: ModelConfig, rows: int, token: str, beyond: Sequence[str]
) -> DataError:
    """Returns the error for rows of text that hold a token without an embedding."""
    remedy = shlex.quote(f"model.new_tokens={json.dumps([*config.new_tokens, *beyond], ensure_ascii=False)}")
    return DataError(
        f"the rows hold {token!r}, one of {len(tokenizer.get_vocab()):,} tokens of the tokenizer, but the base "
        f"{config.name} has embeddings for {rows:,}; train one with {remedy}, or take the token out of the data and "
        "its template"
    )


def pad_token_id(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> int:
    """Returns the id that fills up batches: an existing token that is not the end token, and has an embedding.

    Padding is masked and labelled explicitly, so its identity never matters to the loss; the vocabulary does not
    grow and the tokenizer itself is left alone.
    """
    ids = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0, 1]
    return next(
        token for token in ids if token is not None and token != tokenizer.eos_token_id and (not rows or token < rows)
    )
