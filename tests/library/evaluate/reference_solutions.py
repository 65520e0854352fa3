"""Runs the reference solutions of a problem file in the sandbox, and prints how many pass.

``python tests/library/evaluate/reference_solutions.py HumanEval.jsonl.gz`` prints a row per user,
with and without namespaces: solutions that pass, and CPU and wall milliseconds per program.
"""

import argparse
import os
import sys
import time

from hostile_table import columns

from lordjax.evaluate.code_problems import read_problems
from lordjax.evaluate.sandbox import PASSED, run


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    problems = read_problems(parser.parse_args().file).problems

    def solve(without):
        start, before, failed = time.monotonic(), os.times(), []
        for problem in problems:
            program = problem.program(problem.solution)
            result = run(program, checks=problem.checks(), weak=True, without=without)
            if result.outcome != PASSED:
                failed.append(f"{problem.task_id}: {result.error}")
        used = sum(os.times()[:4]) - sum(before[:4])
        return {"failed": failed, "cpu": used, "wall": time.monotonic() - start}

    found, scale = columns(solve), 1000 / len(problems)
    print("| user and isolation | passed | CPU ms | wall ms |\n|---|---|---|---|")
    for name, row in found.items():
        passed = f"{len(problems) - len(row['failed'])} of {len(problems)}"
        print(f"| {name} | {passed} | {row['cpu'] * scale:.0f} | {row['wall'] * scale:.0f} |")
    for name, row in found.items():
        print(*(f"{name}: {line}" for line in row["failed"]), sep="\n", end="")
    sys.exit(any(row["failed"] for row in found.values()))


if __name__ == "__main__":
    main()
