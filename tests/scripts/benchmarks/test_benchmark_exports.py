"""The matrix of methods and exports, and the speed of exports."""

import pytest

from lordjax.scripts.benchmarks.export.matrix import table
from lordjax.scripts.benchmarks.export.speed import table as speed_table


def test_a_cell_is_a_number_or_a_letter_of_a_refusal():
    refusal = "a dense export cannot hold it; export with --to factored"
    rows = [
        {"method": "a", "to": "dense", "target": "T", "logits": 2e-6, "passed": True},
        {"method": "a", "to": "gguf", "target": "L", "refused": refusal},
        {"method": "b", "to": "dense", "target": "T", "logits": 0.5, "passed": False},
        {"method": "b", "to": "gguf", "target": "L", "refused": refusal},
    ]
    lines = table(rows, "logits").splitlines()
    assert lines[0] == "| method | `dense` | `gguf` |" and lines[2] == "| opened by | T | L |"
    assert lines[3:] == [
        "| `a` | 2.0e-06 | a |",
        "| `b` | 5.0e-01 (differs) | a |",
        "",
        f"- a: {refusal}",
    ]


def test_gain_is_the_share_of_what_is_possible():
    row = {"program": "P", "what": "decode", "dense": 10.0, "small": 12.0}
    row |= {"ratio": 1.2, "possible": 1.25, "gain": 0.96}
    assert speed_table({"rows": [row]}).splitlines()[-1] == (
        "| P | decode | 10.0 | 12.0 | 1.20 | 1.25 | 96% |"
    )


@pytest.mark.slow
def test_the_matrix_of_a_tiny_model(tmp_path):
    import json

    from click.testing import CliRunner

    from lordjax.scripts.benchmarks.export.matrix import main

    out = tmp_path / "out.json"
    options = ["--methods", "modegpt-stock,modegpt-per-layer,nf", "--out", str(out)]
    found = CliRunner().invoke(main, options, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    cells = json.loads(out.read_text())["cells"]
    held = {(c["method"], c["to"]) for c in cells if "refused" not in c}
    assert ("modegpt-stock", "dense") in held and ("modegpt-per-layer", "nemotron-nas") in held
    assert ("nf", "gguf") not in held
    assert all(cell.get("passed", True) for cell in cells)
