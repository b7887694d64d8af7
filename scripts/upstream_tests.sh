#!/usr/bin/env bash
# Runs transformers' own model tests on the models that we patch: unpatched, at keep ratio 1 and at 0.5. Whatever passes
# unpatched must pass patched. The tests are those of the installed transformers version, out of its source distribution.
#
#   scripts/upstream_tests.sh                 every host
#   scripts/upstream_tests.sh -k Model        further arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
version=$(python -c 'import transformers; print(transformers.__version__)')
python -m pip download --quiet --no-deps --no-binary transformers --dest "$work" "transformers==$version"
tar -xzf "$work/transformers-$version.tar.gz" -C "$work"
python -m pip install --quiet --no-deps --target "$work/dependencies" parameterized  # transformers' tests need it, we don't
PYTHONPATH="$PWD:$work/dependencies${PYTHONPATH:+:$PYTHONPATH}" \
    python scripts/upstream_compare.py "$work/transformers-$version/tests" "$@"
