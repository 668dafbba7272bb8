"""The tokenizer of the demo: byte-level BPE in which a word is the same token wherever it stands."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from demo_world.corpus import documents
from demo_world.instructions import PREAMBLE, PREAMBLE_WITH_INPUT, prompt, train_rows
from demo_world.world import PEOPLE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE: Final = 1568
SPECIAL_TOKENS: Final = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
CONTEXT_LENGTH: Final = 256

FIXED_TEXTS: Final = (PREAMBLE, PREAMBLE_WITH_INPUT)
"""The sentences that open every Alpaca prompt are one token each: they are half of a prompt, and say nothing."""


def build_tokenizer(document_count: int = 6000) -> "PreTrainedTokenizerFast":
    """Trains the tokenizer on corpus documents and training prompts; it adds no special tokens itself.

    A plain byte-level BPE has two tokens for a word, with and without a leading space; here the
    normalizer puts a space before the text and after each newline, and the decoder takes it away.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.Replace("\n", "\n "), normalizers.Prepend(" ")]
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\n ", "\n"), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_texts(document_count), trainer)
    core.add_tokens([AddedToken(text, normalized=True) for text in FIXED_TEXTS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **SPECIAL_TOKENS,
        model_max_length=CONTEXT_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _texts(document_count: int) -> Iterator[str]:
    """Yields every word of documents and prompts equally often, so that each becomes one token.

    First names come a little less often, so that their syllables become tokens rather than the names.
    """
    texts = [" ".join(text for text, _ in document) for document in documents(document_count, seed=3)]
    texts += [prompt(row) for row in train_rows()]
    first_names = {person.name.split()[0] for person in PEOPLE}
    vocabulary = {word for text in texts for word in re.findall(r"\w+", text)} - first_names
    for _ in range(10):
        yield " ".join(sorted(vocabulary))
        yield "### Venn's\n\n###\n"
    for _ in range(9):
        yield " ".join(sorted(first_names))
