#!/usr/bin/env bash
# torchmetrics 1.9.0: `import torchmetrics` imports scipy.signal (with scipy.stats, optimize and interpolate) if SciPy is
# installed, whatever metric is used afterwards. Another package of the environment decides how long the import takes.
#
# Expected: an optional dependency is imported by the metrics that need it (STOI, SRMR).
# Seen: with SciPy the import takes four times as long, with 530 modules more, in each process of a job;
# a submodule (torchmetrics.functional.classification) does not avoid it, because the package itself does it.
# It is a patch of an alias, scipy.signal.hamming, for a third package.
#
# Printed here (2 cores):
#   without SciPy:   0 modules of it, 0.2 s
#   with SciPy   : 530 modules of it, 0.8 s
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" --quiet --disable-pip-version-check "$@"; }
look() {
    "$folder/venv/bin/python" - "$1" <<'PYTHON'
import sys
import time

import torch

start = time.perf_counter()
import torchmetrics.functional.classification

count = sum(name.partition(".")[0] == "scipy" for name in sys.modules)
print(f"{sys.argv[1]:13}: {count:3} modules of it, {time.perf_counter() - start:.1f} s")
if ("scipy.signal" in sys.modules) != (sys.argv[1] == "with SciPy"):
    sys.exit("torchmetrics behaves differently now")
PYTHON
}
pip install torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
look "without SciPy"
pip install scipy==1.17.1
look "with SciPy"
look "with SciPy"
