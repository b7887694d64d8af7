#!/usr/bin/env bash
# Installs the lower bounds of pyproject.toml into a fresh virtual environment and runs every host's tests.
#
#   scripts/oldest.sh                       on `python`, best the oldest that pyproject.toml allows
#   PYTHON=python3.10 scripts/oldest.sh
#   scripts/oldest.sh tests -x              other tests; all arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"${PYTHON:-python}" -m venv "$environment"
# Every "name>=version" becomes name==version: direct dependencies at their bounds, theirs as pip chooses. numpy is torch's.
sed -nE '/^dependencies|^\[project.optional-dependencies\]/,/^\[project.scripts\]/ s/"([A-Za-z-]+)>=([0-9.]+)"/\n\1==\2\n/gp' \
    pyproject.toml | grep -E '^[A-Za-z-]+==' > "$environment/bounds.txt"
echo "numpy<2" >> "$environment/bounds.txt"
cat "$environment/bounds.txt"
"$environment/bin/pip" install --quiet --constraint "$environment/bounds.txt" --editable '.[test]'
[ $# -gt 0 ] || set -- tests/hosts tests/test_patching.py tests/test_selection.py tests/test_tubelets.py
"$environment/bin/python" -m pytest -q -p no:cacheprovider "$@"
