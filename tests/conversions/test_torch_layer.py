"""The torch code of exports against our codes."""

import jax
import numpy as np
import pytest

from lordjax.conversions.exporters import modeling_lordjax as code
from lordjax.conversions.exporters.torch_layer import arrays_of, spec_of
from lordjax.kernels import normal_float
from lordjax.kernels.quantized import NFQuantized

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("bits", normal_float.BITS)
def test_levels_of_the_torch_code(bits):
    np.testing.assert_array_equal(
        np.asarray(code.levels(bits), np.float32), normal_float.levels(bits)
    )


@pytest.mark.quick("form0", "form4", "form9")
@pytest.mark.parametrize("form", normal_float.grid()[::29])
def test_codes_of_the_torch_code(form):
    """Sizes that no block divides."""
    kernel = NFQuantized.encode(jax.random.normal(jax.random.key(0), (37, 29)), form)
    module = code.kernel(spec_of(kernel))
    state = {name: torch.tensor(array) for name, array in arrays_of(kernel)}
    module.load_state_dict(state)
    np.testing.assert_allclose(module.dense().numpy().T, kernel.materialize(), rtol=1e-6)


def test_the_computed_weight_is_what_the_layer_multiplies_with():
    torch.manual_seed(0)
    spec = {
        "shape": [7, 9],
        "bias": True,
        "inputs": 5,
        "outputs": 6,
        "parts": [{"kind": "dense", "shape": [5, 4]}, {"kind": "dense", "shape": [5, 2]}],
    }
    layer = code.CompressedLinear(spec)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.inputs.copy_(torch.tensor([6, 0, 2, 3, 1]))
    layer.outputs.copy_(torch.tensor([8, 1, 0, 4, 7, 5]))
    x = torch.randn(3, 7)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert layer.weight.shape == (9, 7)
    assert not layer.weight[[2, 3, 6]].any() and not layer.weight[:, [4, 5]].any()
