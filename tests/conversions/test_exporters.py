"""Exports open where they should, and are the same model there: logits equal to 1e-5."""

import functools
import importlib.util
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import CASES, hf_model, logits, some_tokens
from safetensors.numpy import load_file, save_file

from lordjax import factorize, save
from lordjax.conversions.exporters import verify as verification
from lordjax.conversions.exporters.export import EXPORTS, export
from lordjax.conversions.exporters.orbax import restore_orbax
from lordjax.conversions.exporters.verify import RELOAD, verify
from lordjax.conversions.families.registry import FAMILIES, tensor_table
from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.kernels import kinds, normal_float, trees
from lordjax.kernels.base import materialize, nbytes
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized
from lordjax.models import head_axes
from lordjax.storage.saved_model import open_saved

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT asks for it
)

TOKENS = some_tokens()

FORMATS = [
    normal_float.Format(4, 8, "float32", 64, 256),
    normal_float.Format(3, 4, "bfloat16", 16, 16),
]

KERNEL = r"layer_\d+/.*kernel"


def pairs(config, params):
    """A model as `lord` leaves it: factor pairs, and one dense layer."""
    small = trees.flatten(factorize(params, keep=0.5, where=KERNEL))
    return small | {"layer_1/mlp/up/kernel": trees.flatten(params)["layer_1/mlp/up/kernel"]}


def codes(config, params):
    """A model as `lq` and `auto` leave it: quantized matrices, low-rank terms of various ranks."""
    flat, rng = trees.flatten(params), np.random.default_rng(1)
    for i, path in enumerate(trees.select(flat, KERNEL)):
        fan_in, fan_out = flat[path].shape
        flat[path] = base = some_codes(rng, (fan_in, fan_out), FORMATS[i % 2])
        if i % 3 == 2:
            continue
        rank = 2 + i % 4
        left, right = ((fan_in, rank), (rank, fan_out))
        if i % 4 == 1:
            pair = (some_codes(rng, shape, normal_float.Format(8)) for shape in (left, right))
        else:
            pair = (0.2 * rng.normal(size=shape).astype(np.float32) for shape in (left, right))
        flat[path] = LowRankPlusQuantized(base, LowRank(*pair))
    return flat


def some_codes(rng, shape, form):
    """Any bits are codes."""
    count = shape[0] * shape[1]
    blocks, supers = form.blocks(count)
    sizes = (
        normal_float.words_for(count, form.bits),
        normal_float.words_for(blocks, form.scale_bits),
    )
    words = (rng.integers(0, 2**32, size, np.uint32) for size in sizes)
    scales = jnp.asarray(rng.uniform(0.1, 0.3, supers), form.scale_dtype)
    packed = normal_float.Packed(*words, np.asarray(scales), np.float32(0.03))
    return NFQuantized.of(packed, shape, form)


def narrow(config, params):
    """A model as `modegpt-cr` leaves it: narrower layers of various widths, random rotary pairs."""
    rng, flat = np.random.default_rng(2), {}
    for i in range(config.num_layers):
        block = trees.flatten(params[f"layer_{i}"])
        for kind in ("vo", "mlp") if config.qk_norm else ("qk", "vo", "mlp"):
            arrays = head_axes.gather(kind, block, config)
            block = head_axes.scatter(kind, NARROWED[kind](arrays, i, config, rng), block)
        flat |= {f"layer_{i}/{path}": leaf for path, leaf in block.items()}
    return {p: a for p, a in trees.flatten(params).items() if not p.startswith("layer_")} | flat


def _narrow_qk(arrays, i, config, rng):
    if "rope_index" not in arrays:
        return {name: a[..., : 3 + i] for name, a in arrays.items()}
    half = config.head_size // 2
    kept = np.stack([rng.permutation(half)[: half // 2 + i] for _ in range(config.num_kv_heads)])
    columns = np.concatenate([kept, kept + half], axis=1)
    new = {"rope_index": kept}
    for name in set(arrays) - {"rope_index"}:
        a = arrays[name]
        at = np.repeat(columns, a.shape[-2] // len(columns), axis=0)
        at = np.broadcast_to(at, (*a.shape[:-1], at.shape[-1]))
        new[name] = np.take_along_axis(a, at, axis=-1)
    return new


def _narrow_vo(arrays, i, config, rng):
    width = config.head_size - 2 - i
    new = {name: a[..., :width] for name, a in arrays.items()} | {"o": arrays["o"][:, :width]}
    if "v_bias" in arrays:
        new["out_bias"] = 0.1 * rng.normal(size=arrays["o"].shape[-1])
        new["v_bias"] = np.zeros_like(new["v_bias"])
    return new


def _narrow_mlp(arrays, i, config, rng):
    width = config.mlp_size // 2 + 3 * i
    new = {name: a[..., :width] for name, a in arrays.items()}
    return new | {"down": arrays["down"][:width]}


NARROWED = {"qk": _narrow_qk, "vo": _narrow_vo, "mlp": _narrow_mlp}

VARIANTS = {"pairs": pairs, "codes": codes, "narrow": narrow}


def written(directory, checkpoint, flat):
    """A saved model of some parameters."""
    params = trees.unflatten(flat)
    save(directory, checkpoint.config, params, hf_config=checkpoint.hf_config)
    return open_saved(directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(compressed model, its logits) of a family and a variant; of each family one original."""

    @functools.cache
    def original(kind, **options):
        directory = tmp_path_factory.mktemp(kind)
        first = next(case for name, case in CASES.items() if kind in (name, case[0]))
        model_type, plain, *head = first
        hf_model(model_type, {**plain, **options}, *head).save_pretrained(directory)
        return open_checkpoint(directory)

    @functools.cache
    def make(kind, variant, **options):
        checkpoint = original(kind, **options)
        flat = VARIANTS[variant](checkpoint.config, checkpoint.params())
        saved = written(tmp_path_factory.mktemp(kind) / variant, checkpoint, flat)
        # Multiplied out: to decode inside of a compiled model takes long to compile.
        dense = materialize(saved.params())
        return saved, np.asarray(logits(saved.config, dense, TOKENS))

    make.original = original
    return make


def reloaded(directory, to):
    run = RELOAD[to].logits(directory)
    return np.stack([run(window[None]) for window in TOKENS])


def same(saved, expected, directory, to):
    """Exports and compares."""
    export(saved, directory, to)
    np.testing.assert_allclose(reloaded(directory, to), expected, rtol=0, atol=1e-5)


def exports():
    """Two families every way, every family two ways with all kinds of kernels; the rest is slow.

    GGUF files and Nemotron-NAS, which hold none of these variants, have tests of their own, and so
    has vLLM's plugin.
    """
    ways = [name for name in EXPORTS if name not in ("gguf", "nemotron-nas", "vllm")]
    for kind, variant, to in itertools.product([*FAMILIES, "phi4-mini"], VARIANTS, ways):
        often = (variant, to) in (("codes", "factored"), ("narrow", "dense"))
        marks = [] if often or kind in ("llama", "gpt2") else pytest.mark.slow
        if to != "peft" or variant == "codes":
            yield pytest.param(kind, variant, to, marks=marks)


@pytest.mark.quick("llama-codes-*", "gpt2-narrow-*", "gemma2-narrow-dense", "bert-narrow-dense")
@pytest.mark.parametrize(("kind", "variant", "to"), list(exports()))
def test_logits(made, tmp_path, kind, variant, to):
    saved, expected = made(kind, variant)
    if to == "orbax":
        export(saved, tmp_path / "out", to)
        config, params = restore_orbax(tmp_path / "out")
        assert config == saved.config
        assert jax.tree.structure(params) == jax.tree.structure(saved.params())
        jax.tree.map(np.testing.assert_array_equal, params, saved.params())
    else:
        same(saved, expected, tmp_path / "out", to)


@pytest.mark.quick("*-pairs")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("to", ["dense", "factored"])
def test_tied_heads(made, tmp_path, variant, to):
    saved, expected = made("llama", variant, tie_word_embeddings=True)
    same(saved, expected, tmp_path / "out", to)


@pytest.mark.parametrize("to", ["dense", "factored"])
def test_a_compressed_head(made, tmp_path, to):
    checkpoint = made.original("llama")
    small = factorize(checkpoint.params(), keep=0.5)
    assert isinstance(small["head"]["kernel"], LowRank)
    saved = written(tmp_path / "in", checkpoint, trees.flatten(small))
    same(saved, logits(saved.config, small, TOKENS), tmp_path / "out", to)


@pytest.mark.parametrize("kind", FAMILIES)
def test_store_is_the_inverse_of_load(made, kind):
    checkpoint = made.original(kind)
    tensors = load_file(checkpoint.path / "model.safetensors")
    table = tensor_table(checkpoint.hf_config)
    found = {name: np.full_like(tensors[name], np.nan) for name in {s.name for s in table.values()}}
    for source in table.values():
        source.store(source.load(tensors[source.name]), found[source.name])
    less_one = {source.name for source in table.values() if source.offset}
    for name, tensor in found.items():
        # 1 + w is rounded once in float32.
        rounding = 2e-7 if name in less_one else 0
        np.testing.assert_allclose(tensor, tensors[name], rtol=0, atol=rounding)


def test_an_original_is_exported_as_it_was(made, tmp_path):
    checkpoint = made.original("gpt2")
    export(checkpoint, tmp_path / "out", "dense")
    before, after = (
        load_file(d / "model.safetensors") for d in (checkpoint.path, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def opened(directory, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, **options
    ).eval()


@pytest.mark.quick("llama-narrow")
@pytest.mark.parametrize(("kind", "variant"), [("llama", "narrow"), ("gpt2", "codes")])
def test_generation(made, tmp_path, kind, variant):
    """With the stock key/value cache; the same tokens as without any."""
    saved, _ = made(kind, variant)
    ids = torch.as_tensor(TOKENS[:1, :5]).long()
    sequences = []
    for to in ("dense", "factored"):
        export(saved, tmp_path / to, to)
        for cached in (True, False):
            options = {"max_new_tokens": 12, "do_sample": False, "use_cache": cached}
            mask = torch.ones_like(ids)
            model = opened(tmp_path / to)
            out = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
            sequences.append(out.tolist())
    assert all(other == sequences[0] for other in sequences)


def test_a_factored_export_is_saved_again_by_transformers(made, tmp_path):
    saved, expected = made("gpt2", "narrow")
    export(saved, tmp_path / "a", "factored")
    opened(tmp_path / "a").save_pretrained(tmp_path / "b")
    np.testing.assert_allclose(reloaded(tmp_path / "b", "factored"), expected, rtol=0, atol=1e-5)


def test_codes_stay_packed(made, tmp_path):
    saved, _ = made("llama", "codes")
    export(saved, tmp_path / "out", "factored")
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    assert sum(tensor.nbytes for tensor in tensors) == nbytes(saved.leaves())


def test_codes_survive_other_dtypes(made, tmp_path):
    """A cast of the model reaches neither the codes nor their scales."""
    saved, _ = made("llama", "codes")
    export(saved, tmp_path / "out", "factored")
    name = "model.layers.1.mlp.down_proj"
    expected = materialize(saved.block(1)["mlp"]["down"]["kernel"])
    assert isinstance(saved.block(1)["mlp"]["down"]["kernel"], NFQuantized)
    for model in (
        opened(tmp_path / "out", dtype=torch.bfloat16),
        opened(tmp_path / "out").half(),
    ):
        weight = model.get_submodule(name).weight
        np.testing.assert_allclose(weight.numpy().T, expected, rtol=1e-6)


# --- biases --------------------------------------------------------------------------------------


def with_bias(saved, *layers):
    """The parameters with random biases besides."""
    flat, rng = trees.flatten(saved.params()), np.random.default_rng(3)
    for layer in layers:
        size = flat[f"{layer}/kernel"].shape[-1]
        flat[f"{layer}/bias"] = rng.normal(size=size).astype(np.float32)
    return flat


@pytest.mark.parametrize("to", ["dense", "factored"])
def test_a_bias_turns_the_switch_of_the_family_on(made, tmp_path, to):
    saved, _ = made("llama", "pairs")
    flat = with_bias(saved, "layer_1/attention/o", "layer_0/mlp/up")
    biased = written(tmp_path / "in", saved, flat)
    expected = logits(biased.config, biased.params(), TOKENS)
    same(biased, expected, tmp_path / "out", to)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (
        (True,) * 2 if to == "dense" else (False,) * 2
    )


def test_a_bias_that_the_family_has_no_place_for(made, tmp_path):
    saved, _ = made("mistral", "pairs")
    flat = with_bias(saved, "layer_1/attention/o", "layer_0/attention/o")
    biased = written(tmp_path / "in", saved, flat)
    with pytest.raises(ValueError, match=r"mistral.* 2 param.*attention/o/bias.*--to factored"):
        export(biased, tmp_path / "out", "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    expected = logits(biased.config, biased.params(), TOKENS)
    same(biased, expected, tmp_path / "out", "factored")


# --- heads, and what is carried ------------------------------------------------------------------

HEADS = (
    "llama-classes",
    "llama-bare",
    "gpt2-tokens",
    "bert-tokens",
    "distilbert-span",
    "bert-bare",
)


@pytest.mark.quick("llama-classes-pairs-dense", "bert-bare-narrow-dense")
@pytest.mark.parametrize("to", ["dense", "factored"])
@pytest.mark.parametrize("variant", ["pairs", "narrow"])
@pytest.mark.parametrize("kind", HEADS)
def test_heads(made, tmp_path, kind, variant, to):
    saved, expected = made(kind, variant)
    same(saved, expected, tmp_path / "out", to)


@pytest.mark.quick("bert-bare")
@pytest.mark.parametrize("kind", ["bert-bare", "roberta-bare", "pretraining"])
def test_poolers_are_carried(made, tmp_path, kind):
    """Through a saved model and an export; the torch class finds what it had."""
    if kind == "pretraining":
        config = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48}
        config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
        model = transformers.BertForPreTraining(transformers.BertConfig(**config))
        model.save_pretrained(tmp_path / "model")
        original = open_checkpoint(tmp_path / "model")
        paths = {"pooler/dense/kernel", "pooler/dense/bias"}
        paths |= {"seq_relationship/kernel", "seq_relationship/bias"}
    else:
        original, paths = made.original(kind), {"pooler/dense/kernel", "pooler/dense/bias"}
    assert paths <= original.leaves().keys()
    saved = written(tmp_path / "saved", original, trees.flatten(original.params()))
    assert saved.is_original()
    export(saved, tmp_path / "out", "dense")
    before, after = (load_file(d / "model.safetensors") for d in (original.path, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    assert verify(saved, tmp_path / "out", "dense", TOKENS)["passed"]


# --- files ---------------------------------------------------------------------------------------


def test_shards(made, tmp_path):
    saved, expected = made("llama", "pairs")
    export(saved, tmp_path / "out", "dense", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 1
    assert files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert index["metadata"]["total_size"] == sum(
        array.nbytes for file in files for array in load_file(tmp_path / "out" / file).values()
    )
    np.testing.assert_allclose(reloaded(tmp_path / "out", "dense"), expected, rtol=0, atol=1e-5)


def test_config_is_the_original_with_its_dtype(made, tmp_path):
    saved, _ = made("llama", "narrow")
    export(saved, tmp_path / "out", "dense", dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**made.original("llama").hf_config, "dtype": "bfloat16"}
    assert opened(tmp_path / "out").dtype == torch.bfloat16


def test_the_adapter(made, tmp_path):
    """Every product is one, scaled by 1, of its own rank; those of a fused layer are one."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    saved, _ = made("phi3", "codes")
    export(saved, tmp_path / "out", "peft")
    base = opened(tmp_path / "out")
    model = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    scales, ranks = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            scales[name], ranks[name] = module.scaling["default"], module.r["default"]
    products = [k for k in saved.leaves().values() if isinstance(k, LowRankPlusQuantized)]
    assert set(scales.values()) == {1.0}
    assert sum(ranks.values()) == sum(kernel.rank for kernel in products)
    assert len(set(ranks.values())) > 1


def test_orbax_is_plain(made, tmp_path):
    import orbax.checkpoint as ocp

    saved, _ = made("llama", "codes")
    export(saved, tmp_path / "out", "orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "out" / "params")
    flat = trees.flatten(tree)
    assert all(isinstance(leaf, np.ndarray) for leaf in flat.values())
    assert any(path.endswith("kernel/base/codes") for path in flat)
    (tmp_path / "out" / "manifest.json").write_text('{"lordjax": {}}')
    with pytest.raises(ValueError, match=r"manifest\.json: was changed"):
        restore_orbax(tmp_path / "out")
    (tmp_path / "out" / "checksums.json").unlink()  # as older versions wrote it
    with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
        restore_orbax(tmp_path / "out")


# --- verification --------------------------------------------------------------------------------


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_verification_notices(made, tmp_path):
    saved, _ = made("llama", "pairs")
    export(saved, tmp_path / "out", "dense")
    found = verify(saved, tmp_path / "out", "dense", TOKENS)
    assert found["passed"] and found["logit_difference"] < 1e-5 < found["tolerance"]
    assert abs(found["perplexity_difference"]) < 1e-3

    name = "model.layers.1.mlp.up_proj.weight"
    edit(tmp_path / "out", lambda tensors: tensors[name].__imul__(1.05))
    found = verify(saved, tmp_path / "out", "dense", TOKENS)
    assert not found["passed"]
    edit(tmp_path / "out", lambda tensors: tensors[name].fill(np.nan))
    assert not verify(saved, tmp_path / "out", "dense", TOKENS)["passed"]
    edit(tmp_path / "out", lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"missing_keys.*{name}"):
        verify(saved, tmp_path / "out", "dense", TOKENS)


@pytest.mark.quick("bfloat16")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_verification_allows_for_the_stored_dtype(made, tmp_path, dtype):
    saved, _ = made("llama", "pairs")
    params = trees.flatten(kinds.astype(saved.params(), dtype))
    half = written(tmp_path / "in", saved, params)
    for to in ("dense", "factored"):
        export(half, tmp_path / to, to)
        found = verify(half, tmp_path / to, to, TOKENS)
        assert found["passed"]
    assert found["logit_difference"] < 1e-5  # factors as they are


# --- wrong inputs --------------------------------------------------------------------------------


def test_wrong_inputs(made, tmp_path, monkeypatch):
    saved, _ = made("llama", "pairs")
    out = tmp_path / "out"
    with pytest.raises(KeyError, match="no export 'densse'; did you mean dense"):
        export(saved, out, "densse")
    with pytest.raises(ValueError, match="nothing to make an adapter of"):
        export(saved, out, "peft")
    with pytest.raises(ValueError, match=r"is not finite in float16"):
        flat = trees.flatten(saved.params())
        big = {**flat, "final_norm/scale": 1e6 * flat["final_norm/scale"]}
        export(written(tmp_path / "big", saved, big), out, "dense", dtype="float16")
    with pytest.raises(ValueError, match=r"describes another model"):
        save(tmp_path / "other", saved.config, saved.params(), hf_config={"model_type": "gpt2"})
        export(open_saved(tmp_path / "other"), out, "dense")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match="make room"):
        export(saved, out, "factored")
    assert {path.name for path in tmp_path.iterdir()} == {"big", "other"}
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(FileExistsError, match="not an empty directory"):
        export(saved, out, "dense")


def test_a_factored_export_is_not_read_back(made, tmp_path):
    saved, _ = made("llama", "pairs")
    export(saved, tmp_path / "out", "factored")
    with pytest.raises(ValueError, match="open the directory that it was made from"):
        open_checkpoint(tmp_path / "out")


def test_what_is_not_installed_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else find(name)
    )
    verification.check_installed("factored")
    with pytest.raises(ImportError, match=r"not installed: peft; pip install 'lordjax\[export\]'"):
        verification.check_installed("peft")
