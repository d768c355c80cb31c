#!/usr/bin/env bash
# Install the test extra into .venv and run style checks and the whole test suite.
# Arguments go to pytest: bash scripts/test.sh tests/models -k experts
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment test
ruff check .
ruff format --check .
# Two files at a time, each on one thread: see tests/conftest.py.
python -m pytest -n 2 --dist loadfile "$@"
