#!/usr/bin/env bash
# torch 2.13.0 on a CPU with AVX512-BF16: the bfloat16 weight gradient of a strided convolution over an image that is
# smaller than the kernel holds whatever was in memory before, at the taps that no pixel reaches. They must be 0.
#
# Expected: a 3 x 3 kernel with stride 2 and padding 1 over a 1 x 1 image meets the pixel with its centre alone, so the
# gradient of the other eight taps is exactly 0: in float32, in float16, and in bfloat16 without oneDNN it is.
# Seen: in bfloat16 with oneDNN (the default) and channels-last, taps that are not reached get numbers that nothing
# computed. Where the freed memory held NaN, as a model has after one bad step, the gradient is NaN in most runs; where
# it held small numbers nobody notices. No warning. The last stages of a ResNet have such images as soon as its input
# is 16 x 16: the loss is right, and the weights are NaN after the first step of the optimiser.
# The same with a 5 x 5 kernel and stride 3, or an image of 2 x 2, kernel 5 and stride 4.
#
# Printed here (Linux, x86-64 with avx512_bf16):
#   float32   onednn True : 0 of 20 gradients are wrong
#   float16   onednn True : 0 of 20 gradients are wrong
#   bfloat16  onednn False: 0 of 20 gradients are wrong
#   bfloat16  onednn True : 16 of 20 gradients are wrong    (the number varies)
set -euo pipefail

if ! grep -q avx512_bf16 /proc/cpuinfo; then
    echo "not checked: this CPU has no AVX512-BF16, and oneDNN takes another path" >&2
    exit 3
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import torch

warnings.simplefilter("ignore")
torch.manual_seed(0)


def wrong(dtype, onednn, runs=20):
    found = 0
    for _ in range(runs):
        used = [torch.full((1 << 14,), float("nan")) for _ in range(50)]
        del used  # memory that the allocator hands out again
        images = torch.randn(16, 8, 1, 1).to(dtype).to(memory_format=torch.channels_last)
        conv = torch.nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False).to(dtype)
        conv = conv.to(memory_format=torch.channels_last)
        with torch.backends.mkldnn.flags(enabled=onednn):
            conv(images).float().square().mean().backward()
        gradient = conv.weight.grad.float()
        gradient[:, :, 1, 1] = 0  # the centre, which is right
        found += bool((gradient != 0).any())  # NaN is not 0
    print(f"{str(dtype).removeprefix('torch.'):9} onednn {onednn!s:5}: {found} of {runs} gradients are wrong")
    return found


others = [wrong(torch.float32, True), wrong(torch.float16, True), wrong(torch.bfloat16, False)]
if any(others) or not wrong(torch.bfloat16, True):
    sys.exit("torch behaves differently now")
PYTHON
