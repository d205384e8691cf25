"""The script of the tower at toy size: its variants compute the same features, its table has its form."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from benchmarks.speed import tower as benchmark
from benchmarks.speed.measure import Row, paired_times, peak_memory, report
from benchmarks.speed.models import TOY_CLIP, TowerCase, features


CASE = TowerCase(TOY_CLIP)


def test_table_of_times(tmp_path, capsys):
    out = tmp_path / "tables" / "tower.json"
    threads = torch.get_num_threads()
    try:
        benchmark.main(
            ["--toy", "--parts", "times", "loop", "--repeats=2", "--threads=1", "--device=cpu", "--out", str(out)]
        )
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "| what | ours | rival | ratio | must reach | reached |" in printed
    (table,) = json.loads(out.read_text()).values()
    assert {row["at_most"] for row in table["rows"]} == {1.0, 1.08, 2.25, None}
    for row in table["rows"]:
        assert f"| {row['what']} ({row['note']})" in printed or f"| {row['what']} |" in printed
        assert row["ours"] > 0 and row["rival"] > 0 and math.isfinite(row["ratio"])
        assert (row["reached"] is None) == (row["at_most"] is None)
    for name in ("processor", "threads", "load", "torch", "transformers", "batch_size", "num_experts", "repeats"):
        assert name in table["context"] and name in printed
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_variants_give_the_features_of_clip():
    """With B = 0 the tower is CLIP: the timed variants do the same work."""
    pixels = CASE.pixels()
    hidden_states = CASE.clip()(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(features(CASE.clip(), pixels), hidden_states[-1][:, 1:])
    expected = hidden_states[-2][:, 1:]
    folded = CASE.tower()
    folded.fold_experts()
    for tower in (CASE.tower(), folded):
        torch.testing.assert_close(features(tower, pixels), expected)
    loop = benchmark.LoopOfExpertsTower(CASE).eval()
    for layer in loop.clip.encoder.layers:
        for expert in (*layer.mlp.fc1_experts, *layer.mlp.fc2_experts):
            torch.nn.init.zeros_(expert[2].weight), torch.nn.init.zeros_(expert[2].bias)
    torch.testing.assert_close(features(loop, pixels), expected)


@pytest.mark.parametrize("what", benchmark.MEMORY)
def test_what_is_run_in_fresh_processes(what):
    benchmark.measured(what, json.loads(json.dumps(asdict(CASE))))()


def test_building_from_a_folder_and_from_memory(tmp_path):
    CASE.clip().save_pretrained(tmp_path)
    for source in (str(tmp_path), ""):
        assert benchmark.measured_building(source, asdict(CASE))().config.num_hidden_layers == 2


def test_peak_memory_is_that_of_another_process(tmp_path, monkeypatch):
    (tmp_path / "wasteful.py").write_text(
        "def build(megabytes):\n"
        "    held = bytearray(64 << 20)\n"
        "    bytearray(256 << 20)\n"
        "    return lambda: (held, bytearray(megabytes << 20))\n"
        "def fail():\n"
        "    raise KeyError('no such case')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    beyond = peak_memory("wasteful:build", {"megabytes": 128}, beyond=True)
    assert 120 << 20 < beyond < 160 << 20
    with pytest.raises(RuntimeError, match="no such case"):
        peak_memory("wasteful:fail", {})


def test_runs_are_interleaved():
    order = []
    times = paired_times({name: lambda name=name: order.append(name) for name in "abc"}, repeats=3)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order[3:]) == "abccbaabc"


def test_report_keeps_other_tables_and_says_what_is_not_reached(tmp_path, capsys):
    out = tmp_path / "tables.json"
    report("One", [Row("size", 3.0, 2.0, "MB", at_most=1.2, note="why")], {"shape": 7}, out)
    report("Two", [Row("speed", 1.0, 30.0, at_least=20, times_faster=True), Row("open", 1.0, None)], {}, out)
    printed = capsys.readouterr().out
    assert "| size (why) | 3 MB | 2 MB | 1.50 | <= 1.20 | **no** |" in printed
    assert "| speed | 1 s | 30 s | 30.00 | >= 20 | yes |" in printed
    assert "| open | 1 s |  |  |  |  |" in printed and "shape: 7" in printed
    tables = json.loads(out.read_text())
    assert [tables[name]["rows"][0]["reached"] for name in ("One", "Two")] == [False, True]
