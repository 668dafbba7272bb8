"""Which chat template writes a set's conversations: the tokenizer's own, one of ours by name, or a file.

Sets without conversations have one too, which asks as their rows do.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from transformers import PreTrainedTokenizerBase

from qlora.config.schema import TEMPLATE_NAMES
from qlora.data.formats.known_formats import Prompt
from qlora.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)

FOLDER: Final = Path(__file__).parent / "chat_templates"
INSTRUCTION: Final = "instruction"
"""The file that becomes the template of an instruction format; what it asks with is put before it."""
FALLBACK: Final = "guanaco"
"""What `auto` takes for a tokenizer without a chat template: plain text, so any tokenizer can write it."""
WITH_CALLS: Final = ("chatml", "llama-3", FALLBACK)
"""Templates that write all but thoughts, calls beside an answer too; the last one suits any tokenizer."""
WITH_THOUGHTS: Final = "chatml-thoughts"
"""The template that writes the thoughts of every turn."""

NEEDED_TOKENS: Final[dict[str, tuple[str, ...]]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "chatml-thoughts": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "phi-3": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
}
"""Tokens that a template is written with; spelled out in pieces they would mean nothing to the model."""


class Template(NamedTuple):
    """A chat template: its name in reports and its Jinja text."""

    name: str
    text: str


def choose_template(name: str, tokenizer: PreTrainedTokenizerBase, *, key: str = "data.template") -> Template:
    """Returns the template that `data.template` means for this tokenizer; raises `ConfigError` where it cannot be."""
    if name == "auto":
        if tokenizer.chat_template:
            return Template("the tokenizer's own", _own_template(tokenizer, key))
        log.info("%s=auto: the tokenizer has no chat template; taking %s", key, FALLBACK)
        name = FALLBACK
    if name not in TEMPLATE_NAMES:
        return Template(name, _read_file(name, key))
    missing = _missing_tokens(name, tokenizer)
    if missing:
        raise ConfigError(
            f"{key}={name} writes the tokens {', '.join(missing)}, which this tokenizer does not have; add them "
            f"('{_new_tokens(missing)}' trains them too), or take a template of plain text, such as {FALLBACK}"
        )
    return Template(name, read_template(name))


def suggest_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the name of a template of ours that writes every conversation but its thoughts with this tokenizer."""
    return next(name for name in WITH_CALLS if not _missing_tokens(name, tokenizer))


def suggest_thoughts(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the name of a template of ours that writes thoughts, with the tokens that this tokenizer needs for it."""
    missing = _missing_tokens(WITH_THOUGHTS, tokenizer)
    return WITH_THOUGHTS + (f" with '{_new_tokens(missing)}'" if missing else "")


def _missing_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    known = tokenizer.get_vocab()
    return [token for token in NEEDED_TOKENS.get(name, ()) if token not in known]


def _new_tokens(tokens: list[str]) -> str:
    return f"model.new_tokens=[{','.join(json.dumps(token, ensure_ascii=False) for token in tokens)}]"


def prompt_template(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Returns the chat template that asks as rows of an instruction format were asked, token for token.

    Training tokenized a prompt by itself, where some tokenizers put a blank before it that they do not put behind
    `<bos>`: there the template writes it.
    """
    begin = tokenizer.bos_token or ""
    alone, behind = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt.ask("a"), begin + prompt.ask("a"))
    )
    words = {**asdict(prompt), "lead": "" if behind[-len(alone) :] == alone else " "}
    del words["name"]
    values = ", ".join(json.dumps(value) for value in words.values())
    header = f"{{%- set {', '.join(words)} = {values} %}}\n"
    return Template(f"the prompt of {prompt.name}", header + read_template(INSTRUCTION))


@cache
def read_template(name: str) -> str:
    """Returns the Jinja text of one of our templates."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def _own_template(tokenizer: PreTrainedTokenizerBase, key: str) -> str:
    own = tokenizer.chat_template
    if isinstance(own, str):
        return own
    if isinstance(own, list):
        own = {each["name"]: each["template"] for each in own}
    if "default" not in own and len(own) > 1:  # some carry several, such as tool_use
        raise ConfigError(
            f"{key}=auto: the tokenizer has the chat templates {', '.join(own)} but no default; save the one to take "
            f"as a file and give it with {key}=FILE.jinja"
        )
    return own.get("default") or next(iter(own.values()))


def _read_file(name: str, key: str) -> str:
    path = Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ConfigError(f"{key}={name}: no such file{did_you_mean(str(path), siblings)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}={name}: cannot be read ({error})") from None


def choose_saved_template(
    saved: PreTrainedTokenizerBase | None, tokenizer: PreTrainedTokenizerBase, name: str
) -> Template:
    """Returns the template that a training run saved; where it saved none, `data.template` for the tokenizer."""
    if saved is not None and saved.chat_template:
        return choose_template("auto", saved)._replace(name="saved by the training run")
    return choose_template(name, tokenizer)
