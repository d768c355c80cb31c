#!/usr/bin/env bash
# Install the demo extra into .venv and serve the page at http://127.0.0.1:7860, of the quickstart
# unless flags say otherwise: bash scripts/demo.sh --ckpt RUN --port 8000
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment demo
exec python -m demo.app "$@"
