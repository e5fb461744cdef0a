"""Start-up of `bss-ray train`: time to the first training batch, processes and CPU seconds of the demo.

    python benchmarks/startup.py [--against FOLDER] [--repeats 5] [--epochs 15]

Each run is a whole command in a new folder. Times count from before its Python starts. The first batch is there when
the model of a rank is first called in training mode. All processes below the command count that live for a tenth of a
second; the CPU time of a process is that of the last look at it, at most a tenth of a second before its end.

FOLDER is a checkout of another version, for example a `git worktree`. Its runs alternate with those of this version.
Prints medians, the processes of the last run, and with --against the medians of the ratios (goal: at most 0.6 of the
version before this program).
"""

import argparse
import ctypes
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch

from bss_ray.models import LateFusion

GOAL = 0.6
SHOWN = ("first batch", "CPU seconds", "CPU seconds to first batch", "whole command", "processes")
HERE = Path(__file__).resolve().parents[1]
LOOK_S = 0.1
TICKS = os.sysconf("SC_CLK_TCK")
FIRST_BATCH = "BSS_RAY_FIRST_BATCH"  # environment variable: file whose time of change is that of the first batch

# Where a phase ends: the command says so.
PHASES = {
    "imports, settings": "starting Ray on this machine",
    "Ray": "reading train rows",
    "rows": "starting holders and ranks",
}


class Model(LateFusion):
    """The demo's model, which leaves a file when a rank begins to train."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], num_classes: int) -> None:
        super().__init__(shapes, num_classes)

    def forward(self, batch: Any) -> dict[str, Any]:
        file = Path(os.environ[FIRST_BATCH])
        if self.training and not file.exists():
            file.touch()
        return super().forward(batch)


@dataclass
class Run:
    """What one command took."""

    seconds: dict[str, float] = field(default_factory=dict)
    processes: dict[str, tuple[str, float]] = field(default_factory=dict)  # name and CPU seconds by id and start

    def cpu(self) -> float:
        return sum(seconds for _, seconds in self.processes.values())

    def figures(self) -> dict[str, float]:
        return {**self.seconds, "processes": len(self.processes), "CPU seconds": self.cpu()}


def measure(code: Path, options: argparse.Namespace) -> Run:
    """Run the demo with the code of a folder."""
    run = Run()
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        first = Path(folder) / "first"
        started = time.time()
        command = [sys.executable, "-m", "bss_ray.cli", "train", "--storage_path", folder]
        command += ["--model.class_path", "startup.Model", "--loop.epochs", str(options.epochs)]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={
                **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
                "PYTHONPATH": os.pathsep.join([str(code), str(HERE / "benchmarks")]),
                FIRST_BATCH: str(first),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said: list[str] = []
        reader = threading.Thread(target=read, args=(process, said, lambda phase: mark(run, phase, started)))
        reader.start()
        while process.poll() is None:
            look(run)
            if first.exists():
                run.seconds.setdefault("CPU seconds to first batch", run.cpu())
            time.sleep(LOOK_S)
        reader.join()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n" + "".join(said[-40:]))
        run.seconds["first batch"] = first.stat().st_mtime - started
        run.seconds["whole command"] = time.time() - started
        while any(stat[0] != "Z" for stat in descendants().values()):  # Ray's servers end after the command
            look(run)
            time.sleep(LOOK_S)
        look(run)
        bury_orphans()
    return run


def read(process: subprocess.Popen[str], said: list[str], on_phase: Callable[[str], None]) -> None:
    """Follow what the command prints."""
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        for phase, text in PHASES.items():
            if text in line:
                on_phase(phase)


def mark(run: Run, phase: str, started: float) -> None:
    run.seconds[phase] = time.time() - started


def look(run: Run) -> None:
    """Note names and CPU times of all processes of the command."""
    for pid, stat in descendants().items():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:
            continue
        cpu = (int(stat[11]) + int(stat[12])) / TICKS
        run.processes[f"{pid} {stat[19]}"] = (short_name(words) or run.processes.get(pid, ("", 0))[0], cpu)


def short_name(words: list[str]) -> str:
    """`ray::HolderActor`, `gcs_server`, `bss-ray`."""
    title = words[0].strip()
    if title.startswith("ray::"):
        return re.split(r"[.(]", title)[0]
    if "bss_ray.cli" in words:
        return "bss-ray"
    scripts = [word for word in words if word.endswith(".py")]
    return Path(scripts[-1] if scripts else title).name


def descendants() -> dict[str, list[str]]:
    """Fields of /proc/PID/stat from the state on, of all processes below this one, also those whose parent is gone."""
    fields = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields[entry.name] = (entry / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue
    below, found = {str(os.getpid())}, {}
    while below:
        new = {pid: stat for pid, stat in fields.items() if stat[1] in below}
        found |= new
        below = set(new)
    return found


def adopt_orphans() -> None:
    """Processes below this one whose parent ends become its own children (Linux)."""
    if ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) != 0:  # PR_SET_CHILD_SUBREAPER
        raise SystemExit("this system does not let a process adopt orphans")


def bury_orphans() -> None:
    """Wait for all children, after the command."""
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def show(label: str, runs: list[Run]) -> dict[str, float]:
    """Print the medians of a version, and the processes of its last run."""
    figures = [run.figures() for run in runs]
    medians = {name: statistics.median(each[name] for each in figures) for name in figures[0]}
    print(f"\n{label}")
    last = 0.0
    for name in (*PHASES, "first batch", "whole command"):
        print(f"  {name:26} {medians[name]:6.1f} s  (+{medians[name] - last:.1f})")
        last = medians[name]
    for name in ("processes", "CPU seconds to first batch", "CPU seconds"):
        print(f"  {name:26} {medians[name]:6.1f}")
    seconds: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for name, cpu in runs[-1].processes.values():
        seconds[name] += cpu
        count[name] += 1
    print("  CPU seconds by process: " + ", ".join(f"{count[n]} {n} {cpu:.1f}" for n, cpu in seconds.most_common()))
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="checkout of another version")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"ray {ray.__version__}, torch {torch.__version__}"
    )
    adopt_orphans()
    versions = {"this version": HERE}
    if options.against is not None:
        versions[f"{options.against}"] = options.against.resolve()
    runs: dict[str, list[Run]] = {label: [] for label in versions}
    for repeat in range(options.repeats):
        for label, code in versions.items():
            runs[label].append(measure(code, options))
            figures = runs[label][-1].figures()
            shown = (
                f"{name} {figures[name]:.1f}" for name in ("first batch", "whole command", "CPU seconds", "processes")
            )
            print(f"{repeat + 1}. {label}: {', '.join(shown)}", flush=True)
    for label in versions:
        show(label, runs[label])
    if options.against is not None:
        print(f"\nratios, medians of {options.repeats} (goal for the first two: at most {GOAL}):")
        for name in SHOWN:
            pairs = zip(*([run.figures()[name] for run in each] for each in runs.values()), strict=True)
            print(f"  {name:26} {statistics.median(ours / theirs for ours, theirs in pairs):.2f}")


if __name__ == "__main__":
    main()
