"""What data sets and other tools call the speakers of a chat, and the keys of its turns."""

from __future__ import annotations

from typing import Final

ROLES: Final = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
"""What data sets call the speakers, and what chat templates call them."""
CALL_ROLES: Final = ("function_call", "tool_call")
"""Those of the assistant's turns that are calls."""
THOUGHT_KEYS: Final = ("reasoning_content", "thinking", "reasoning")
"""What data sets and templates call the thoughts before an answer."""
SWITCHES: Final = (
    *("train", "training", "trainable", "train_on_turn", "loss", "loss_mask", "loss_weight", "loss_scale"),
    "weight",
)
"""Keys of a turn by which other tools say whether the loss counts it: Axolotl, ms-swift, OpenAI, LLaMA-Factory."""
