"""The map, the spectra, and the files they are written to."""

import re

import numpy as np
import pytest
from matplotlib.image import imread

from lordjax import InMemory
from lordjax.kernels import trees
from lordjax.names import is_block_linear
from lordjax.scripts.report import figures, spectra
from lordjax.scripts.report.draw import COLOURS
from lordjax.scripts.report.grid import BITS, SHARE, grid_of


@pytest.fixture
def curves(config, mixed):
    return spectra.of_stored(InMemory(config, trees.unflatten(mixed)), [0, 2])


def test_cells_are_the_numbers_of_the_model(config, mixed):
    grid = grid_of(config, mixed)
    assert grid.unit == SHARE and grid.extent == (0.0, 1.0)
    assert grid.columns[:2] == ("attention/q", "attention/k") and grid.columns[-1] == "mlp/down"
    texts = {place: cell.text for place, cell in grid.cells.items()}
    assert texts[1, "attention/q"] == f"{5 * 64 / 1024:.2f} r5"
    assert texts[0, "mlp/up"] == texts[0, "mlp/down"] == f"{40 / 64:.2f} w40"
    assert texts[0, "attention/q"] == "1.00"
    assert {cell.path for cell in grid.cells.values()} == set(filter(is_block_linear, mixed))
    assert "rank" in grid.legend and "width" in grid.legend and "NormalFloat" not in grid.legend


def test_quantized_models_are_coloured_by_bits(config, quantized):
    grid = grid_of(config, quantized)
    least, most = grid.extent
    assert grid.unit == BITS
    assert all(least <= cell.value <= most for cell in grid.cells.values())
    cell = grid.cells[2, "mlp/gate"]
    assert cell.note == "nf3" and 3 < cell.value < 4
    assert grid.cells[0, "attention/k"].value == 32
    assert "NormalFloat" in grid.legend


def test_colours_can_be_told_apart_in_grey():
    import matplotlib

    colours = matplotlib.colormaps[COLOURS](np.linspace(0, 1, 64))[:, :3]
    grey = colours @ [0.299, 0.587, 0.114]
    assert (np.diff(grey) > 0).all() and grey[-1] - grey[0] > 0.6


def test_a_curve_is_what_is_left():
    curve = spectra.curve_of("layer_0/mlp/up/kernel", [6.0, 3.0, 1.0, 0.0], chosen=2)
    np.testing.assert_allclose(curve.left, [1.0, 0.4, 0.1, 0.0, 0.0])
    assert curve.ranks.tolist() == [0, 1, 2, 3, 4] and curve.left_at_chosen == 0.1
    zero = spectra.curve_of("layer_0/mlp", np.zeros(3))
    assert not zero.left.any() and zero.left_at_chosen is None
    long = spectra.curve_of("layer_0/mlp", np.ones(5000), chosen=1234)
    assert len(long.ranks) <= spectra.POINTS + 1 and 1234 in long.ranks


def test_nothing_is_left_beyond_the_rank_of_a_factor_pair(curves, mixed):
    found = {curve.path: curve for curve in curves.curves}
    pair = found["layer_2/attention/q/kernel"]
    assert (pair.left[pair.ranks < 9] > 1e-3).all() and (pair.left[pair.ranks >= 9] < 1e-6).all()
    dense = found["layer_2/mlp/up/kernel"]
    squares = np.linalg.svd(mixed[dense.path], compute_uv=False) ** 2
    tails = [squares[rank:].sum() / squares.sum() for rank in dense.ranks]
    np.testing.assert_allclose(dense.left, tails, rtol=1e-3, atol=1e-6)
    assert "layers 0, 2 of 3" in curves.about


def test_layers_are_as_many_as_operations_allow(config, mixed):
    assert spectra.affordable(config, mixed, 1e12) == [0, 1, 2]
    assert spectra.affordable(config, mixed, 1e12, most=2) == [0, 2]
    assert spectra.affordable(config, mixed, 1e12, most=1) == [1]
    assert spectra.affordable(config, mixed, 1.0) == []


@pytest.mark.quick(".png")
@pytest.mark.parametrize("suffix", figures.FORMATS)
def test_pictures_are_written_in_every_format(config, quantized, curves, tmp_path, suffix):
    file = tmp_path / "new" / f"picture{suffix}"
    grid = grid_of(config, quantized)

    def written():
        figures.write_picture(figures.check_picture(str(file)), "a title", grid, curves)
        return file.read_bytes()

    content = written()
    assert written() == content  # what was there is replaced
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert content.startswith(start[suffix])
    if suffix == ".png":
        picture = imread(file)
        assert min(picture.shape[:2]) > 500 and picture.std() > 0.05


def test_the_map_has_labels_and_every_number(config, mixed):
    grid = grid_of(config, mixed)
    text = re.findall(r"<text[^>]*>([^<]*)</text>", figures.map_svg(grid))
    for cell in grid.cells.values():
        assert cell.text in text
    assert {*grid.columns, "layer", "matrix", grid.unit, grid.legend} <= set(text)


def test_the_spectra_have_labels(curves):
    text = re.findall(r"<text[^>]*>([^<]*)</text>", figures.spectra_svg(curves))
    assert {"attention/q", "mlp/down", "rank", "share left", "layer"} <= set(text)


def test_settings_of_the_reader_change_nothing(config, mixed):
    import matplotlib

    grid = grid_of(config, mixed)
    usual = figures.map_svg(grid)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "image.cmap": "jet"}):
        assert figures.map_svg(grid) == usual
        assert matplotlib.rcParams["font.size"] == 30
