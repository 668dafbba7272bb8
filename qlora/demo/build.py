"""Writes the shipped rows and tokenizer of the demo: `python -m qlora.demo.build`."""

from qlora.demo.instructions import DATA_FOLDER, eval_rows, train_rows, write_rows
from qlora.demo.tokenizer import MODEL_FOLDER, build_tokenizer


def build() -> None:
    """Writes `data/*.jsonl` and the tokenizer files of `model/`, the same at every call."""
    write_rows(train_rows(), DATA_FOLDER / "train.jsonl")
    write_rows(eval_rows(), DATA_FOLDER / "eval.jsonl")
    build_tokenizer().save_pretrained(MODEL_FOLDER)


if __name__ == "__main__":
    build()
