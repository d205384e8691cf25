"""The command for a machine with a GPU, at toy size on a CPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import on_gpu


def test_a_part_that_is_stopped_is_reported() -> None:
    result = on_gpu.run_part("losses", ["--toy", "--device", "cpu"], 0.2)
    assert "stopped" in result["error"] and "tables" not in result
    (line,) = on_gpu.lines_of("losses", result)
    assert "**failed**" in line and line.count("|") == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        on_gpu.main([])
    assert "--toy --device cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_one_table_of_several_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    broken = ("losses", ["--no_such_flag"], 1.0)
    monkeypatch.setitem(on_gpu.PARTS, "broken", broken)
    out = tmp_path / "on_gpu.json"
    flags = ["--toy", "--device", "cpu", "--out", str(out), "--parts"]
    with pytest.raises(SystemExit):  # one part failed, and the others ran
        on_gpu.main([*flags, "broken", "losses"])
    printed = capsys.readouterr().out
    assert "**failed**" in printed and "distillation losses and heads" in printed and "processor" in printed
    found = json.loads(out.read_text())["parts"]
    assert "no_such_flag" in found["broken"]["error"] and found["losses"]["tables"]
    assert found["losses"]["seconds"] > 0
