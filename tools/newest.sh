#!/usr/bin/env bash
# Installs the newest release of every dependency, beyond the upper bounds of pyproject.toml too, in an environment of
# its own; runs the contract tests of what is used of other libraries there, and a short training run.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${VENV:-$work/venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"

# Hydra and OmegaConf keep their bounds: their next versions are another configuration language.
"$venv/bin/python" - > "$work/requirements.txt" << 'EOF'
import re
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
for requirement in [*project["dependencies"], "pytest", "pytest-xdist"]:
    name = re.match(r"[\w.-]+", requirement)[0]
    print(requirement if name in ("hydra-core", "omegaconf") else name)
EOF
"$venv/bin/pip" install -q --upgrade -r "$work/requirements.txt"
"$venv/bin/pip" install -q --no-deps -e .
"$venv/bin/pip" list 2> /dev/null |
  grep -iE '^(torch|transformers|peft|bitsandbytes|datasets|accelerate|tokenizers|huggingface_hub|numpy) '

"$venv/bin/python" -m pytest tests/upstream
"$venv/bin/python" -m qlora hydra.run.dir="$work/run" trainer.max_steps=20 data.max_eval_samples=20
