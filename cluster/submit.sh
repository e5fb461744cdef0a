#!/usr/bin/env bash
# Runs a command on a Ray cluster and follows its log, with this checkout's code and environment, from any folder:
#
#   cluster/submit.sh --address http://localhost:8265 train --config my.yaml --storage_path /shared/runs
#
# It is `bss-ray submit` without an activated environment; cluster/submit.sh --help explains all options.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
if [[ ! -x $python ]]; then
  python=$(command -v python3) || { echo "submit.sh: no Python here; make setup" >&2; exit 1; }
fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m bss_ray.cli submit "$@"
