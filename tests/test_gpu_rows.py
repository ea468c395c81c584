"""Rows that benchmarks/gpu.sh leaves, as CSV files."""

from __future__ import annotations

import csv
import json

from benchmarks.gpu.rows import to_csv


def test_rows_keep_their_values_and_their_provenance(tmp_path):
    stamp = {"device": "a card", "python": "3.12.3", "torch": "2", "lightning": "2", "lightning_eff": "0", "date": "1"}
    rows = [
        {"part": "zclip", "what": "ZClip fp32", "right": True, "ms": 0.125, **stamp},
        {"part": "zclip", "what": "launches", "right": False, "launches": 5, **stamp},
        {"part": "steps", "what": "none", "right": True, "step_ms": 1.0, **stamp},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "kernels.csv").write_text("op,ms\nread,1\n")
    results = tmp_path / "results"
    results.mkdir()
    assert [path.name for path in to_csv(tmp_path, results)] == ["gpu_zclip.csv", "kernels_gpu.csv"]
    with (results / "gpu_zclip.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first == {"what": "ZClip fp32", "right": "True", "ms": "0.125", "launches": "", **stamp}
    assert (second["right"], second["launches"], second["device"]) == ("False", "5", "a card")
    assert list(first)[-len(stamp) :] == list(stamp)
    assert (results / "kernels_gpu.csv").read_text() == "op,ms\nread,1\n"
