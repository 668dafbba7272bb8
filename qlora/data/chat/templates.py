"""Which chat template writes a set's conversations: the tokenizer's own, one of ours by name, or a file.

Sets without conversations have one too, which asks as their rows do.
"""

from __future__ import annotations

import importlib
import json
import logging
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from transformers import PreTrainedTokenizerBase

from qlora.config.registries.chat_templates import TEMPLATES, installed_template
from qlora.data.formats.prompts import Prompt
from qlora.errors import ConfigError, DataError, did_you_mean

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


class Template(NamedTuple):
    """A chat template: its name in reports and its Jinja text."""

    name: str
    text: str


def choose_template(name: str, tokenizer: PreTrainedTokenizerBase, *, key: str = "data.template") -> Template:
    """Returns the template that `data.template` means for this tokenizer; raises `ConfigError` where it cannot be."""
    if name == "auto":
        if tokenizer.chat_template:
            return Template("the tokenizer's own", _tokenizer_template(tokenizer, key))
        log.info("%s=auto: the tokenizer has no chat template; taking %s", key, FALLBACK)
        name = FALLBACK
    if (target := installed_template(name)) is not None:
        return Template(name, _read_installed(target, f"{key}={name}"))
    if name not in TEMPLATES:
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
    return [token for token in TEMPLATES[name] if token not in known]


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
    # By the names that the template's file reads.
    variables = {
        "before": prompt.prefix,
        "behind": prompt.behind,
        "between": prompt.between,
        "before_both": prompt.prefix_both,
        "in_text": prompt.in_text,
        "lead": "" if behind[-len(alone) :] == alone else " ",
    }
    values = ", ".join(json.dumps(value) for value in variables.values())
    header = f"{{%- set {', '.join(variables)} = {values} %}}\n"
    return Template(f"the prompt of {prompt.name}", header + read_template(INSTRUCTION))


@cache
def read_template(name: str) -> str:
    """Returns the Jinja text of one of our templates."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def _tokenizer_template(tokenizer: PreTrainedTokenizerBase, key: str) -> str:
    template = tokenizer.chat_template
    if isinstance(template, str):
        return template
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if "default" not in template and len(template) > 1:  # some carry several, such as tool_use
        raise ConfigError(
            f"{key}=auto: the tokenizer has the chat templates {', '.join(template)} but no default; save the one to "
            f"take as a file and give it with {key}=FILE.jinja"
        )
    return template.get("default") or next(iter(template.values()))


def _read_installed(target: str, label: str) -> str:
    """Returns the text of a template that an installed package adds."""
    module, _, name = target.partition(":")
    try:
        text = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DataError(f"{label}: its package registers {target}, which cannot be read ({error})") from error
    if not isinstance(text, str):
        raise DataError(f"{label}: {target} is of type {type(text).__name__}; it must be the template's Jinja text")
    return text


def _read_file(name: str, key: str) -> str:
    path = Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(f"{key}={name}: no such file{did_you_mean(str(path), siblings)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{key}={name}: cannot be read ({error})") from None


def choose_saved_template(
    saved: PreTrainedTokenizerBase | None, tokenizer: PreTrainedTokenizerBase, name: str
) -> Template:
    """Returns the template that a training run saved; where it saved none, `data.template` for the tokenizer."""
    if saved is not None and saved.chat_template:
        return choose_template("auto", saved)._replace(name="saved by the training run")
    return choose_template(name, tokenizer)
