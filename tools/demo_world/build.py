"""`python tools/demo_world/build.py [RUN_FOLDER]` writes the embedded rows and tokenizer, and the weights of a run.

RUN_FOLDER is the folder of a finished pretraining run; docs/embedded.md names its command.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # this package, when the file is run

from demo_world.instructions import eval_rows, train_rows, write_rows
from demo_world.preferences import eval_pairs, train_pairs
from demo_world.tokenizer import build_tokenizer
from qlora.demo.instructions import DATA_FOLDER
from qlora.models.model_files import EMBEDDED

MODEL_FOLDER = EMBEDDED["tiny"]


def build() -> None:
    """Writes `data/*.jsonl` and the tokenizer files of `model/`; every call writes the same bytes."""
    write_rows(train_rows(), DATA_FOLDER / "train.jsonl")
    write_rows(eval_rows(), DATA_FOLDER / "eval.jsonl")
    write_rows(train_pairs(), DATA_FOLDER / "preferences.jsonl")
    write_rows(eval_pairs(), DATA_FOLDER / "preferences_eval.jsonl")
    build_tokenizer().save_pretrained(str(MODEL_FOLDER))


def install_weights(run_folder: Path) -> None:
    """Copies a pretrained model into the package, its weights rounded to bfloat16 (6 MB)."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(run_folder / "model" / "model.safetensors")
    halved = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    save_file(halved, MODEL_FOLDER / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((run_folder / "model" / name).read_text())
        settings |= {"dtype": "bfloat16"} if "dtype" in settings else {}
        settings["use_cache"] = True  # off in training only
        (MODEL_FOLDER / name).write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    build()
    for folder in sys.argv[1:]:
        install_weights(Path(folder))
