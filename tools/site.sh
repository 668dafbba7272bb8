#!/usr/bin/env bash
# Builds the manual as a site in FOLDER (default: site): tools/site.sh [FOLDER]. A link that leads nowhere ends it.
# Needs the extra `docs`: pip install -c constraints.txt -e '.[docs]'
set -euo pipefail
cd "$(dirname "$0")/.."
export NO_MKDOCS_2_WARNING=1 # an advertisement for another program
exec "${PYTHON:-python}" -m mkdocs build --strict --site-dir "${1:-site}"
