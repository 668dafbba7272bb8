#!/usr/bin/env bash
# Builds the wheel and the source archive into dist/ and checks them: the version is that of the tag (if one is given) and
# of the changelog, the descriptions are valid, and the wheel runs from an environment and a folder of its own.
# usage: tools/release.sh [vVERSION]     (PIP_EXTRA_INDEX_URL: where pip finds a CPU build of torch)
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' qlora/__init__.py)
if [[ "${1:-}" == v* && "$1" != "v$version" ]]; then
  echo "error: the tag is $1, and qlora/__init__.py says $version; change one of them" >&2
  exit 1
fi
if ! grep -q "^## $version\b" CHANGELOG.md; then
  echo "error: CHANGELOG.md has no section $version; add it" >&2
  exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf dist
python3 -m venv "$work/build"
"$work/build/bin/pip" install -q build twine
"$work/build/bin/python" -m build --outdir dist . > /dev/null
"$work/build/bin/twine" check --strict dist/*

python3 -m venv "$work/run"
"$work/run/bin/pip" install -q -c constraints.txt dist/*.whl
cd "$work"
printed=$(run/bin/python -c 'import qlora; print(qlora.__version__, qlora.__file__)')
[[ "$printed" == "$version $work/run/"* ]] || { echo "error: the wheel was not what was imported: $printed" >&2; exit 1; }
HF_HUB_OFFLINE=1 run/bin/qlora trainer.max_steps=2 data.max_train_samples=20 data.max_eval_samples=4 evaluation=loss \
  evaluation.baseline=false task.predict=false name=wheel > log || { cat log; exit 1; }
[ -s outputs/runs/wheel/adapter/adapter_model.safetensors ]
echo "dist/ holds $version, and its wheel trains"
