"""The directory of a tiny fine-tuning run, and what a resumed run reads there."""

import contextlib
import functools
import shutil

import jax
import numpy as np
from mutations import plant_link

RUN = "out.run"
STEPS, BEST = 6, 4
LINES = [{"step": count, "loss": loss} for count, loss in ((2, 3.0), (BEST, 2.0), (STEPS, 2.5))]
ABOUT = {"data": "a", "settings": {"steps": STEPS}}


@functools.cache
def state():
    """What a run keeps: arrays of several dtypes, and the steps behind it."""
    import ml_dtypes

    from lordjax.finetune.step import State

    def draw(*shape, dtype=np.float32):  # small integers: sums with steps are exact
        return np.random.default_rng(0).integers(-9, 10, shape).astype(dtype)

    params = {"kernel": {"left": draw(6, 2), "right": draw(2, 5)}}
    params["norm"] = draw(8, dtype=ml_dtypes.bfloat16)
    optimizer = [np.int32(0), {"mean": draw(6, 2)}]
    return jax.tree.map(jax.numpy.asarray, State(np.int32(0), params, optimizer))


@contextlib.contextmanager
def opened(directory, resume):
    """The checkpoints, the metrics and the last state, as `training_run.train` opens them."""
    from lordjax.finetune import training_run
    from lordjax.finetune.run_directory import claimed

    with (
        claimed(directory / RUN, resume, ABOUT, 0),
        training_run.opened(directory / RUN, 1, state(), None) as found,
    ):
        yield found


def run(directory):
    """A run whose best checkpoint is an earlier one."""
    with opened(directory, resume=False) as (checkpoints, log, first):
        for line in LINES:
            log.write(**line)
            checkpoints.save(after(first, line["step"]), line["loss"])


def read_run(directory):
    """What the resumed run will end with; steps after a lost checkpoint are run again."""
    with opened(directory, resume=True) as (checkpoints, log, last):
        whole = STEPS in checkpoints.steps()
        best = checkpoints.best() if whole else BEST
        known = best in checkpoints.steps()
        return {
            "last": before(last),
            "best": best,
            "of best": before(checkpoints.restore(state(), best)) if known else state(),
            "lines": log.lines if whole else LINES,
        }


def after(found, count):
    """The state that so many steps make of one: they add their number to every array."""
    with jax.numpy_dtype_promotion("standard"):
        moved = jax.tree.map(lambda a: (a + count).astype(a.dtype), found[1:])
    return found._replace(step=found.step + count, params=moved[0], optimizer=moved[1])


def before(found):
    """The state before the first step."""
    return after(found, -found.step)


def lose(rng, directory):
    """A checkpoint is gone, or lies under the name of the other."""
    there = sorted((directory / RUN / "checkpoints").iterdir())
    one, other = rng.sample(there, 2)
    shutil.rmtree(one)
    if rng.random() < 0.5:
        shutil.copytree(other, one)


def plant_links(rng, directory):
    """A file or folder of the run is a link to something outside."""
    outside, folder = directory.parent / "outside", directory / RUN
    there = sorted(path for path in folder.rglob("*") if path.name != "lock")
    path = rng.choice([*there, folder / "metrics.jsonl.new", folder / "lock"])
    plant_link(path, outside)
