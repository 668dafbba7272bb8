"""A tokenizer whose ids are known without it: <pad> 0, <s> 1, </s> 2, and byte b is 3 + b."""

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


def build_byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    core = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    core.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", model_max_length=32, **special)
