"""A model's tokenizer as far as it lies on this machine, without torch: for the plan, which counts tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora.config.schema import ModelConfig
from qlora.models.model_files import check_tokenizer_folder, is_local, locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "tokenizer.json"


def find_local_tokenizer(config: ModelConfig) -> Path | None:
    """Returns the folder of a model's tokenizer, or of what was downloaded before; None: it is not here."""
    key, name = ("model.tokenizer", config.tokenizer) if config.tokenizer else ("model.name", config.name)
    folder = _find_folder(locate(name, key), config)
    if folder is None or not (folder / FILE).is_file():
        return None
    check_tokenizer_folder(folder, key)
    return folder


def load_local_tokenizer(folder: Path, new_tokens: list[str]) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder with the tokens of `model.new_tokens`.

    transformers chooses the class by the model, which imports torch. `tokenizer.json` says all that counting needs,
    but of a SentencePiece Llama, whose class builds a tokenizer of its own from the vocabulary.
    """
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    tokenizer = (LlamaTokenizer if _is_sentencepiece_llama(folder) else PreTrainedTokenizerFast).from_pretrained(
        str(folder)
    )
    add_new_tokens(tokenizer, new_tokens)
    return tokenizer


def add_new_tokens(tokenizer: PreTrainedTokenizerBase, new_tokens: list[str]) -> int:
    """Adds the tokens of `model.new_tokens` and returns how many of them are new.

    They are found in a text as they are written; those in angle brackets are marks, which decoding can leave out.
    """
    from transformers import AddedToken

    return tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=token[:1] == "<" and token[-1:] == ">") for token in new_tokens]
    )


def _is_sentencepiece_llama(folder: Path) -> bool:
    named = check_tokenizer_folder(folder, "model.name").get("tokenizer_class")
    if not isinstance(named, str) or named.removesuffix("Fast") != "LlamaTokenizer":
        return False
    return '"ByteLevel"' not in (folder / FILE).read_text(encoding="utf-8")


def _find_folder(source: str, config: ModelConfig) -> Path | None:
    if is_local(source):
        return Path(source)
    from huggingface_hub import try_to_load_from_cache  # slow to import

    revision = None if config.tokenizer else config.revision
    path = try_to_load_from_cache(source, FILE, cache_dir=config.cache_dir, revision=revision)
    return Path(path).parent if isinstance(path, str) else None
