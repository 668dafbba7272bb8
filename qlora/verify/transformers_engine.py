"""Serves a folder by plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.errors import DataError
from qlora.models.json_files import library_reads
from qlora.runtime.atomic_files import read_record
from qlora.upstream.transformers import decode, generate
from qlora.verify.engine import Continuation, Likely, Message, Served

MERGE_REPORT = "merge_report.json"


class TransformersEngine:
    """A model folder with the tokenizer, the template and the settings that lie in it."""

    def __init__(self, folder: Path, *, device: torch.device, trust_remote_code: bool) -> None:
        if not (folder / "config.json").is_file():
            raise DataError(f"verify.path={folder}: no model there; qlora merge writes one")
        with library_reads(f"verify.path={folder}", "its model or its tokenizer"):
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        self.model.eval().to(device)
        report = read_record(folder / MERGE_REPORT) or {}
        precision = str(self.model.dtype).removeprefix("torch.")
        self.served = Served("transformers", str(folder), precision, report.get("max_kl"))

    @torch.no_grad()
    def next_tokens(self, ids: Sequence[int]) -> list[Likely]:
        """Returns all tokens with their log-probabilities behind a prompt."""
        logits = self.model(input_ids=torch.tensor([list(ids)], device=self.model.device)).logits[0, -1]
        values = torch.log_softmax(logits.float(), dim=-1).tolist()
        return [Likely((index,), value) for index, value in enumerate(values)]

    def chat_tokens(self, messages: Sequence[Message]) -> list[int] | int:
        """Returns the tokens of a chat by the folder's template."""
        if not self.tokenizer.chat_template:
            return []
        text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def continue_greedily(self, ids: Sequence[int], count: int) -> Continuation:
        """Returns what the model generates by the settings in its folder, without sampling."""
        prompt = torch.tensor([list(ids)], device=self.model.device)
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        output = generate(self.model, inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)
        written = output[0, prompt.shape[1] :].tolist()
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        stops = bool(written) and written[-1] in ends
        return Continuation(decode(self.tokenizer, written[:-1] if stops else written), stops)

    def close(self) -> None:
        """Releases the model."""
        del self.model
