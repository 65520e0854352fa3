"""Mutated files of every format end in our error with the path, or in values that the file says."""

import pytest
from campaign import FAULTS, FORMATS, Bench, cases

CASES = 30  # per kind of mutation; `campaign.py` runs as many as you like
# Quick ones of formats that are read without transformers and torch.
QUICK = ("plan", "npy", "conversations", "parameters")


# A warning over a damaged file is no damage of ours.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.quick(*QUICK)
@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files(name, tmp_path):
    if FORMATS[name].needs is not None:
        pytest.importorskip(FORMATS[name].needs)
    bench = Bench(name, tmp_path)
    for case in cases(CASES * len(FORMATS[name].kinds), [name]):
        outcome, detail = bench.run(case[1], "pytest", case[2])
        assert outcome not in FAULTS, f"{outcome} of {' / '.join(map(str, case))}\n{detail}"


def test_cases_are_the_same_every_time():
    assert list(cases(7, ["plan"])) == list(cases(7, ["plan"]))
    assert len(set(cases(100, list(FORMATS)))) == 100
