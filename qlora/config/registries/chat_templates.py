"""The chat templates that `data.template` may name; to check a name reads no template."""

from __future__ import annotations

from typing import Final

from qlora.config.registries.installed import installed_names

CHATML: Final = ("<|im_start|>", "<|im_end|>")
TEMPLATES: Final[dict[str, tuple[str, ...]]] = {
    "alpaca": (),
    "chatml": CHATML,
    "chatml-thoughts": CHATML,
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "guanaco": (),
    "llama-2": (),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),
    "phi-3": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "plain": (),
    "qwen": CHATML,
    "vicuna": (),
    "zephyr": (),
}
"""The templates of this package, each a file `qlora/data/chat/chat_templates/NAME.jinja`, with the tokens that it needs
of a tokenizer: spelled out in several tokens they would mean nothing to the model."""
TEMPLATE_NAMES: Final = ("auto", *TEMPLATES)
"""`auto` is the tokenizer's own template."""
GROUP: Final = "qlora.chat_templates"
"""The entry points by which an installed package adds templates: a name, and `module:NAME`, the Jinja text."""


def template_names() -> list[str]:
    """Returns the names of this package and of installed ones."""
    return [*TEMPLATE_NAMES, *(name for name in installed_names(GROUP) if name not in TEMPLATE_NAMES)]


def installed_template(name: str) -> str | None:
    """Returns where an installed package holds a template, as `module:NAME`; None: no package adds it."""
    return None if name in TEMPLATE_NAMES else installed_names(GROUP).get(name)
