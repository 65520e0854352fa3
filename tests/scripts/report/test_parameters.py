"""Rows of parameters, and rows of several blocks folded into one."""

import pytest

from lordjax.kernels.base import nbytes
from lordjax.kernels.kinds import weights
from lordjax.scripts.report.parameters import block_linear, fold, parameter_rows, ranges

SUMS = ("weights", "dense_weights", "bytes")


@pytest.fixture
def rows(config, quantized):
    return parameter_rows(config, quantized)


def test_every_parameter_has_a_row(rows, quantized):
    assert rows.keys() == quantized.keys()
    for path, row in rows.items():
        assert row["bytes"] == nbytes(quantized[path])
        assert row["weights"] == weights(quantized[path])
    assert rows["layer_1/attention/q/kernel"]["rank"] == 5
    assert rows["layer_0/mlp/up/kernel"]["kept"] == pytest.approx(40 / 64)


def test_folded_rows_add_up_to_the_full_ones(rows):
    folded = fold(rows)
    for key in SUMS:
        assert sum(row[key] for row in folded) == sum(row[key] for row in rows.values())
    places = [
        row["path"] if layer is None else f"layer_{layer}/{row['path']}"
        for row in folded
        for layer in row["layers"] or [None]
    ]
    assert sorted(places) == sorted(rows)


def test_blocks_fold_where_the_kind_is_one(rows, config):
    folded = fold(rows)
    found = {(row["path"], row["kind"]): row for row in folded}
    norm = found["mlp_norm/scale", "dense"]
    assert (norm["layers"], norm["shape"]) == ([0, 1, 2], [config.hidden_size])
    pairs, dense = (found["attention/q/kernel", kind] for kind in ("low_rank", "dense"))
    assert (pairs["layers"], pairs["rank"], dense["layers"]) == ([1, 2], [5, 9], [0])
    assert found["mlp/up/kernel", "dense"]["shape"] == [32, [40, 64]]
    assert found["mlp/gate/kernel", "nf_quantized"]["layers"] == [2]
    outside = [row["layers"] is None for row in folded]
    assert outside == sorted(outside, reverse=True)  # first what is in no block


def test_shares_of_folded_rows_are_those_of_all_their_blocks(rows):
    (pairs,) = (row for row in fold(rows) if row["kind"] == "low_rank")
    assert pairs["kept"] == pytest.approx((5 + 9) * 64 / (2 * 32 * 32))
    assert pairs["bits"] == pytest.approx(32 * pairs["kept"])
    whole = block_linear(rows)
    assert whole["kept"] == pytest.approx(whole["weights"] / whole["dense_weights"])


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([4], "4"), ([0, 1, 2], "0…2"), ([9, 0, 1, 5, 7, 8], "0…1, 5, 7…9")],
)
def test_ranges_of_numbers(numbers, text):
    assert ranges(numbers) == text
