"""What `make gpu` does after the build, in parts that each end within ten minutes.

    python -m benchmarks.gpu [tests] [sanitize] [bench] [--seconds N] [what the part itself takes]

tests: the contract of the cuda and triton backends, and the primitives of the CUDA kernels.
sanitize: the kernels under compute-sanitizer, memcheck and racecheck. bench: ours beside torch's
fastest kernels. Each part writes its log, <part>.txt, into benchmarks/results/<gpu>/.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import machine

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "build/emulator/fastgpt_gpu_cases"
PYTHON = (sys.executable, "-m")
TOOLS = ("memcheck", "racecheck")
ENDED_BY_US = 124


def lacking(*modules: str) -> str | None:
    """What a part needs and is not installed."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(absent)}: pip install {' '.join(absent)}" if absent else None


def run(
    command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str] | None = None
) -> int:
    """Run a command, show its output and add it to `log`; after `seconds` it is interrupted."""

    def heed_interrupts() -> None:
        # What a script starts in its background ignores them, and hands that on.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with (
        log.open("a") as file,
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=heed_interrupts,
        ) as process,
    ):  # fmt: skip
        late = threading.Event()

        def end(with_signal: int) -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, with_signal)

        # pytest prints what it found when it is interrupted; what hangs on a GPU may need more.
        timers = [
            threading.Timer(seconds, end, [signal.SIGINT]),
            threading.Timer(seconds + 20, end, [signal.SIGKILL]),
        ]
        for timer in timers:
            timer.daemon = True
            timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            file.write(line)
        status = process.wait()
        for timer in timers:
            timer.cancel()
    if late.is_set():
        print(f"ended after {seconds:.0f} s: {' '.join(command)}")
        return ENDED_BY_US
    return status


# --- the parts ----------------------------------------------------------------------------------


def tests(log: Path, seconds: float, more: Sequence[str]) -> int:
    """The primitives first: where they do something else than the tests believe, all else fails."""
    status = 0
    if CASES.exists():
        status = run([str(CASES)], log, 60)
    else:
        print(f"{CASES.name} is not built: make gpu-build does it")
    if (reason := lacking("pytest", "hypothesis", "numpy")) is not None:
        print(f"the tests are not run: this part {reason}")
        return 1
    wanted, more = "(cuda or triton or gpu) and not emulated", list(more)
    if "-k" in more:  # a second one would replace the first
        wanted += f" and ({more.pop(more.index('-k') + 1)})"
        more.remove("-k")
    workers = min(8, os.cpu_count() or 1)
    parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
    command = [
        *PYTHON, "pytest", "tests", "-q", "-p", "no:benchmark", "--maxfail=100",
        "--ignore=tests/test_triton_compile.py",  # for GPUs that are not here
        "-k", wanted, *parallel, *more,
    ]  # fmt: skip
    return run(command, log, seconds - 60) or status


def sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def sanitize(log: Path, seconds: float, more: Sequence[str]) -> int:
    program = sanitizer()
    if program is None:
        print("compute-sanitizer is not here; it comes with the CUDA toolkit")
        return 0
    each = seconds / len(TOOLS)
    programs: list[tuple[list[str], float]] = []
    if CASES.exists():
        programs.append(([str(CASES)], each / 4))
    if (reason := lacking("pytest", "numpy")) is None:
        module = [*PYTHON, "tests.every_kernel", f"--seconds={each / 2:.0f}", *more]
        programs.append((module, each * 0.7))
    else:
        print(f"only the primitives are run: the ops' cases {reason}")
    # A tensor has an allocation of its own, so that an access beyond it is seen as one.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status = 0
    for tool in TOOLS:
        options = ["--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
        options += ["--kernel-name", "kernel_substring=fastgpt"]  # torch's own at full speed
        for command, limit in programs:
            ran = run([program, *options, *command], log, limit, environment)
            print(f"{tool}: {'no error' if ran == 0 else f'status {ran}'} of {' '.join(command)}")
            status = status or ran
    return status


def bench(log: Path, seconds: float, more: Sequence[str]) -> int:
    command = [*PYTHON, "benchmarks.gpu_bench", f"--seconds={seconds - 120:.0f}", *more]
    return run(command, log, seconds)


PARTS: dict[str, Callable[[Path, float, Sequence[str]], int]] = {
    "tests": tests,
    "sanitize": sanitize,
    "bench": bench,
}


def parsed(arguments: Sequence[str]) -> tuple[list[str], float, list[str]]:
    """The parts, the seconds of each, and what is for the part itself."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=540.0, help="of each part")
    parts = list(itertools.takewhile(PARTS.__contains__, arguments))
    options, more = parser.parse_known_args(arguments[len(parts) :])
    if more and len(parts) != 1:
        parser.error(f"{' '.join(more)}: expected one of {', '.join(PARTS)} before it")
    return parts or list(PARTS), options.seconds, more


def main(arguments: Sequence[str]) -> int:
    parts, seconds, more = parsed(arguments)
    if not torch.cuda.is_available():
        print("make gpu: this torch sees no GPU; install a CUDA build of torch")
        return 1
    folder = machine.folder_of(torch.device("cuda"))
    folder.mkdir(parents=True, exist_ok=True)
    run([*PYTHON, "fastgpt", "info"], folder / "info.txt", 60)
    results = {}
    for part in parts:
        log = folder / f"{part}.txt"
        log.unlink(missing_ok=True)
        print(f"=== {part}", flush=True)
        results[part] = PARTS[part](log, seconds, more)
    for part, status in results.items():
        ended = "ended before it was done" if status == ENDED_BY_US else f"failed with {status}"
        print(f"make gpu-{part}: {'passed' if status == 0 else ended}")
    print(f"logs and figures are in {folder.relative_to(ROOT)}")
    return next((status for status in results.values() if status), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
