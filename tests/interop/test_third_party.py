"""Models that nobody here wrote: every product is found, nothing is computed in another way."""

import pytest

import lordjax
from lordjax.scripts.benchmarks.functions import checks
from lordjax.scripts.benchmarks.functions.models import CASES

# Counted by hand from the definitions of the models: matrices that are compressed, matrices in
# products that stay dense (tied embeddings, one output), MLPs.
EXPECTED = {
    "FlaxLlama": (2 * 7 + 1, 0, 2),  # q k v o gate up down, head
    "FlaxGPT2": (2 * 4, 1, 2),  # qkv o up down, tied head
    "FlaxOPT": (2 * 6, 1, 2),
    "FlaxRoberta": (2 * 6 + 2, 0, 3),  # the classifier is an MLP, too
    "FlaxBert": (2 * 6 + 1, 1, 2),  # transform of the head, tied decoder
    "FlaxViT": (2 * 6 + 1, 0, 2),
    "FlaxCLIP": (4 * 6 + 2, 0, 4),  # two projections
    "FlaxWhisper": (2 * 6 + 2 * 10, 1, 4),  # cross attention in the decoder
    "equimo ViT (Equinox)": (2 * 4 + 1, 0, 2),  # qkv o up down
    "tunix Llama 3 (NNX)": (2 * 7 + 1, 0, 2),
    "tunix Llama 3.1 8B (NNX)": (32 * 7 + 1, 0, 32),
    "tunix Llama 3.1 405B (NNX)": (126 * 7 + 1, 0, 126),
}
TRANSFORMS = ("jit", "grad", "vmap", "pmap", "remat")
every_model = pytest.mark.parametrize("name", CASES)


LARGEST = pytest.param("tunix Llama 3.1 405B (NNX)", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*CASES, "tunix Llama 3.1 8B (NNX)", LARGEST])
def test_every_product_is_found(case, name):
    found = checks.found(case(name))
    assert found["seen"] == found["counted"]
    assert (found["sites"], found["left"], found["modules"]) == EXPECTED[name]


@every_model
def test_statistics_leave_the_outputs_as_they_are(case, name):
    assert checks.observed_difference(case(name), gradients=name == "FlaxLlama") == 0


@every_model
def test_full_rank_changes_nothing(case, name):
    assert checks.full_rank(case(name)) <= 1e-5


@every_model
def test_half_the_weights_run_under_every_transformation(case, name):
    model = case(name)
    stats = checks.statistics(model)
    small, plan = lordjax.compress_params(model.params, stats, method="modegpt", keep=0.5)
    assert lordjax.nbytes(small) < lordjax.nbytes(model.params)
    assert any(rank is not None for rank in plan.ranks.values())
    assert checks.transforms(model, small) == dict.fromkeys(TRANSFORMS, True)
