"""Runs the cases of the contract tests once each and checks nothing: for tools that watch kernels.

    python -m tests.every_kernel [--backend cuda] [--only PATTERN] [--seconds N]

Ops take turns, so that each has had its share when the seconds are over. `make gpu-sanitize` runs
it under compute-sanitizer.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from collections.abc import Iterator

import torch

import fastgpt
from benchmarks.measure import pattern
from fastgpt import dispatch
from tests.contract import Case, OpSpec, device_of, make, outgoing_for, run
from tests.specs import SPECS

DTYPES = (torch.bfloat16, torch.float32)


def calls(backend: str) -> Iterator[tuple[OpSpec, Case, torch.dtype]]:
    """The first case of every op, the second of every op, and so on."""
    columns = [
        [(spec, case, dtype) for case in spec.cases for dtype in DTYPES if dtype in case.dtypes]
        for op, spec in SPECS.items()
        if backend in dispatch.TABLE[op]
    ]
    for turn in itertools.zip_longest(*columns):
        yield from (call for call in turn if call is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="cuda")
    parser.add_argument(
        "--only", default="", type=pattern, help="a regular expression on `op case dtype`"
    )
    parser.add_argument("--seconds", type=float, default=150.0)
    options = parser.parse_args()
    device = device_of(options.backend)
    if (reason := dispatch.refusal("softmax", options.backend, device, torch.float32)) is not None:
        print(f"tests.every_kernel: {options.backend} {reason}")
        return 1
    until, ran, left = time.monotonic() + options.seconds, 0, 0
    with fastgpt.backend(options.backend):
        for spec, case, dtype in calls(options.backend):
            if not re.search(options.only, f"{spec.op} {case.id} {dtype}"):
                continue
            if time.monotonic() > until:
                left += 1
                continue
            outgoing = outgoing_for(spec, case, dtype)
            run(spec, spec.function, make(spec, case, dtype), outgoing, device)
            ran += 1
    print(f"{ran} cases ran on {options.backend}, for {left} more no time was left")
    return int(ran == 0)


if __name__ == "__main__":
    sys.exit(main())
