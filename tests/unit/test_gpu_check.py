"""The check of a GPU, on the device that is there: all of it on a machine with torch, NumPy and PyArrow alone."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.unit.test_without_ray import run_refusing

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    monkeypatch.setattr(sys, "path", list(sys.path))  # it adds the repository
    spec.loader.exec_module(module)
    return module


@pytest.mark.gpu
def test_everything_on_a_bare_machine(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    arguments = ["--device", DEVICE, "--quick", "--out", str(out)]
    program = f"sys.path.insert(0, {str(SCRIPT.parent)!r})\nimport gpu_check\nsys.exit(gpu_check.main({arguments!r}))"
    run = run_refusing(program, timeout_s=290)
    assert run.returncode == 0, run.stdout + run.stderr
    content = json.loads(out.read_text())
    assert (content["device"], content["quick"]) == (DEVICE, True)
    states = {step["step"]: (step["state"], step["why"]) for step in content["steps"]}
    not_here = {} if DEVICE == "cuda" else {"copies": ("not run", "there is no way to another memory here")}
    assert states == {**dict.fromkeys(states, ("ok", "")), **not_here}
    assert len(states) == 12
    figures = {figure["name"]: figure["value"] for figure in content["figures"]}
    for name in ("bare, fp32", "scorer, bf16", "loader alone", "epoch, online", "epoch, workers", "save", "restore"):
        assert figures[name] > 0
    assert "epoch, workers" in run.stdout, "the table is printed, too"


class TestOutcomes:
    def main(self, module: ModuleType, *arguments: str) -> int:
        code: int = module.main(["--device", "cpu", "--quick", *arguments])
        return code

    def test_a_wrong_result_fails_and_the_other_steps_run(
        self, gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(gpu_check.CudaTransfer, "overlaps", True)
        real = gpu_check.shifted
        monkeypatch.setattr(gpu_check, "shifted", lambda by, batch, random: real(by + 1e-3, batch, random))
        assert self.main(gpu_check, "--only", "transfer", "loader") == 1
        table = capsys.readouterr().out
        assert "transfer    failed" in table
        assert "values of the batches are not those of their rows" in table
        assert "loader      ok" in table

    @pytest.mark.parametrize("broken", ["rows", "similarity"])
    def test_measures_that_differ_fail(
        self, gpu_check: ModuleType, broken: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = gpu_check.Scorer.measure

        def measure(self: object, *args: object) -> object:
            found = real(self, *args)
            getattr(found, broken)[4] += 1
            return found

        assert self.main(gpu_check, "--only", "memory") == 0
        expected = gpu_check.scored("cpu")
        monkeypatch.setattr(gpu_check.Scorer, "measure", measure)
        monkeypatch.setattr(gpu_check, "scored", lambda *_args, **_settings: expected)
        assert self.main(gpu_check, "--only", "memory") == 1

    def test_what_no_time_was_left_for_is_said(
        self, gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "figures.json"
        assert self.main(gpu_check, "--limit-s", "0", "--only", "random", "--out", str(out)) == 3
        assert "random      not run     0.0 s  the time was up" in capsys.readouterr().out
        assert json.loads(out.read_text())["steps"][0]["why"] == "the time was up"

    def test_no_such_device(
        self, gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert gpu_check.main([]) == 2
        assert "torch sees no GPU here" in capsys.readouterr().err


def test_a_step_that_hangs_ends_with_a_table(tmp_path: Path) -> None:
    program = (
        f"import sys, time; sys.path.insert(0, {str(SCRIPT.parent)!r}); import gpu_check; gpu_check.GRACE_S = 0.5; "
        "gpu_check.STEPS['random'] = lambda bench: time.sleep(100); "
        f"gpu_check.main(['--device', 'cpu', '--only', 'random', '--limit-s', '1', '--out', {str(tmp_path / 'out')!r}])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90, check=False)
    assert run.returncode == 3, run.stderr
    assert "random      not run" in run.stdout
    assert (tmp_path / "out").exists()


def test_help_teaches() -> None:
    command = [sys.executable, str(SCRIPT), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    for text in ("It needs torch, NumPy and PyArrow", "epochs ", "Exit status:", "--limit-s"):
        assert text in run.stdout
