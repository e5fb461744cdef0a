#!/usr/bin/env bash
# torch 2.13.0: the first optimizer of a process imports TorchDynamo and SymPy, also where nothing is compiled.
#
# Expected: `torch._dynamo` is a lazy module, and eager training does without it (`import torch` does).
# Seen: `torch.optim.SGD(...)` takes as long as `import torch` itself, the first time: `Optimizer.add_param_group` is
# wrapped to be skipped by the compiler, and the wrapper imports the compiler to say so. DistributedDataParallel does
# the same in its constructor. A process that is started for each rank, trial or restart pays for it each time, after
# the moment in which its start-up seems to be over.
#
# Printed here (2 cores):
#   import torch: 1.1 s, 1114 modules, no compiler
#   first SGD   : 1.1 s, 1937 modules
#   second SGD  : 0.0 s, 1937 modules
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

COMPILER = {"torch._dynamo", "sympy"}
start = time.perf_counter()
import torch

if COMPILER & set(sys.modules):
    sys.exit("torch behaves differently now: `import torch` imports the compiler")
print(f"import torch: {time.perf_counter() - start:.1f} s, {len(sys.modules)} modules, no compiler")
weights = [torch.nn.Parameter(torch.zeros(1))]
for name in ("first SGD", "second SGD"):
    start = time.perf_counter()
    torch.optim.SGD(weights, lr=0.1)
    print(f"{name:12}: {time.perf_counter() - start:.1f} s, {len(sys.modules)} modules")
    if not COMPILER <= set(sys.modules):
        sys.exit("torch behaves differently now: an optimizer does without the compiler")
PYTHON
