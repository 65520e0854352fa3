"""``lordjax inspect``: a list for people, every parameter in JSON, a picture."""

import json
import re

import pytest

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def small(tiny, run, tmp_path_factory):
    """The tiny model by svd with ranks that differ between the layers."""
    out = tmp_path_factory.mktemp("small") / "out"
    given = ("--calibration", tiny / "tokens.npy", "--seq-len", 16, "--method", "lord")
    found = run("compress", tiny / "model", out, *given, "--keep", 0.6)
    assert found.exit_code == 0, found.stderr
    return out


def test_equal_blocks_are_one_row_and_full_lists_all(tiny, run):
    short = run("inspect", tiny / "model").stdout.splitlines()
    full = run("inspect", tiny / "model", "--full").stdout.splitlines()
    assert [line for line in short if line.startswith("layer")] == ["layer_0…2/"]
    assert [line for line in full if line.startswith("layer")] == [f"layer_{i}/" for i in range(3)]
    kernels = ["".join(line.split()[:1]) for line in short if "kernel" in line]
    assert len(kernels) == len(set(kernels)) == 7
    assert sum("kernel" in line for line in full) == 3 * 7


def test_rows_of_some_blocks_say_of_which(small, run):
    lines = run("inspect", small).stdout.splitlines()
    rows = json.loads(run("inspect", small, "--json").stdout)["parameters"]
    ranks = {i: rows[f"layer_{i}/mlp/up/kernel"]["rank"] for i in range(3)}
    pairs = [i for i, rank in ranks.items() if rank is not None]
    found = [line for line in lines if "up/kernel" in line and "low_rank" in line]
    assert len(found) == 1 and pairs
    least, most = min(ranks[i] for i in pairs), max(ranks[i] for i in pairs)
    assert (str(least) if least == most else f"{least}…{most}") in found[0].split()
    assert ("layers" in found[0]) == (len(pairs) < 3)


def test_json_has_every_parameter_with_and_without_picture(small, run, tmp_path):
    plain = run("inspect", small, "--json")
    drawn = run("inspect", small, "--json", "--full", "--picture", tmp_path / "a.svg")
    assert drawn.exit_code == 0, drawn.stderr
    assert json.loads(plain.stdout) == json.loads(drawn.stdout)
    keys = ["model", "kind", "config", "weights", "bytes", "file_bytes", "block_linear"]
    assert list(json.loads(plain.stdout)) == [*keys, "parameters"]


def test_the_picture_shows_the_ranks_of_the_plan(small, run, tmp_path):
    found = run("inspect", small, "--picture", tmp_path / "picture.svg")
    assert found.exit_code == 0, found.stderr
    assert f"picture: {tmp_path / 'picture.svg'}" in found.stderr
    text = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "picture.svg").read_text())
    cells = sorted(word.split("r")[1] for word in text if re.fullmatch(r"\d\.\d\d r\d+", word))
    ranks = json.loads((small / "plan.json").read_text())["ranks"].values()
    assert cells == sorted(str(rank) for rank in ranks if rank is not None)
    assert any("singular values" in line for line in text)
    kept = json.loads(run("inspect", small, "--json").stdout)["block_linear"]["kept"]
    assert any(f"{kept:.1%} of the block linear weights are kept" in line for line in text)


def test_an_elastic_model_shows_the_errors_of_all_budgets(tiny, run, tmp_path):
    given = ("--calibration", tiny / "tokens.npy", "--seq-len", 16, "--method", "svd", "--elastic")
    assert run("compress", tiny / "model", tmp_path / "out", *given).exit_code == 0
    found = run("inspect", tmp_path / "out", "--picture", tmp_path / "picture.svg")
    assert found.exit_code == 0, found.stderr
    assert "predicted error" in (tmp_path / "picture.svg").read_text()


def test_wrong_pictures_are_one_line(tiny, fails, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    command = ("inspect", tiny / "model", "--picture")
    fails("a picture is a file that ends in .png, .svg, .pdf", *command, tmp_path / "a.gif")
    fails("a picture is a file that ends in", *command, tmp_path / "a")
    fails("is a directory; name a file in it", *command, tmp_path / "folder.png")
    fails("is not a writable directory", *command, tmp_path / "file" / "a.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
