"""PEFT adapters are merged into their base; weights that others have quantized are refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from commands import fails, run
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lordjax.conversions.readers.checkpoint import open_checkpoint, read_config
from lordjax.models import Transformer
from lordjax.scripts.opened_model import model_checksums, open_model

# Warnings of PEFT about transformers and about what is trained are not ours.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TOKENS = np.random.default_rng(0).integers(0, 50, (2, 9), np.int32)
LLAMA = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
ATTENTION = ["q_proj", "v_proj"]
# What an adapter is -> its settings.
ADAPTERS = {
    "lora": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 16},
    "rslora": {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "target_modules": ATTENTION,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 3},
        "alpha_pattern": {"v_proj": 5},
    },
    "dora": {"target_modules": ["down_proj", "k_proj"], "use_dora": True},
    "whole": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of a Llama and a GPT-2, whose matrices are stored transposed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases")
    small = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder / "llama")
    GPT2LMHeadModel(small).save_pretrained(folder / "gpt2")
    return folder


def adapted(base, out, kind, **settings):
    """Writes an adapter with random values; returns torch's logits of the merged model."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    model = get_peft_model(kind.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter).abs())
    model.save_pretrained(out)
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS).long()).logits.numpy()


def logits(path):
    model = open_checkpoint(path)
    return Transformer(model.config).apply({"params": model.params()}, TOKENS)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_merged(bases, tmp_path, name):
    expected = adapted(bases / "llama", tmp_path, LlamaForCausalLM, **ADAPTERS[name])
    np.testing.assert_allclose(logits(tmp_path), expected, atol=1e-5)
    assert np.abs(logits(bases / "llama") - expected).max() > 1e-2


def test_an_adapter_of_transposed_matrices(bases, tmp_path):
    settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    expected = adapted(bases / "gpt2", tmp_path, GPT2LMHeadModel, **settings)
    np.testing.assert_allclose(logits(tmp_path), expected, atol=1e-5)


def test_an_adapter_of_a_bare_model(bases, tmp_path):
    """The names of the base omit the prefix of the family."""
    bare = shutil.copytree(bases / "llama", tmp_path / "bare")
    tensors = load_file(bare / "model.safetensors")
    save_file({n.removeprefix("model."): a for n, a in tensors.items()}, bare / "model.safetensors")
    out = tmp_path / "adapter"
    expected = adapted(bases / "llama", out, LlamaForCausalLM, **ADAPTERS["lora"])
    rename(out, base_model_name_or_path="../bare")  # beside the adapter
    np.testing.assert_allclose(logits(out), expected, atol=1e-5)


def rename(adapter, **settings):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.full
def test_commands_open_an_adapter(bases, tiny, tmp_path, text):
    base = shutil.copytree(bases / "llama", tmp_path / "base")
    out, small = tmp_path / "adapter", tmp_path / "small"
    adapted(base, out, LlamaForCausalLM, **ADAPTERS["lora"])
    np.save(tmp_path / "ids.npy", np.tile(TOKENS, (8, 4)))
    data = ("--calibration", tmp_path / "ids.npy", "--seq-len", 32)
    found = run("compress", out, small, *data, "--method", "svd", "--keep", "0.9")
    assert found.exit_code == 0, found.stderr
    assert run("plan", out, "--method", "svd").exit_code == 0
    assert read_config(out) == read_config(base)
    sums = model_checksums(open_model(str(out)))
    assert {"adapter_model.safetensors", "adapter_config.json", "base/model.safetensors"} <= {*sums}


def test_adapters_that_cannot_be_merged_are_refused(bases, tmp_path):
    out = tmp_path / "adapter"
    adapted(bases / "llama", out, LlamaForCausalLM, **ADAPTERS["lora"])
    original = (out / "adapter_config.json").read_text()
    for settings, message in (
        ({"peft_type": "IA3"}, "peft_type 'IA3'; expected one of LORA"),
        ({"r": 0}, "r is 0; expected a positive number"),
        ({"layer_replication": [[0, 2]]}, "merge the adapter with PEFT"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
        ({"base_model_name_or_path": "/no/where"}, "the base model of this adapter is not there"),
        ({"base_model_name_or_path": str(bases / "gpt2")}, "8 tensors of the adapter fit none"),
    ):
        rename(out, **settings)
        fails(message, "inspect", out)
        (out / "adapter_config.json").write_text(original)
    tensors = load_file(out / "adapter_model.safetensors")
    first = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {first: tensors[first][:, :5]}, out / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit model\.layers\.0\.self_attn\.q_proj"):
        open_checkpoint(out).params()
    (out / "adapter_model.safetensors").unlink()
    fails("an adapter without weights", "inspect", out)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "fp8"}, "FP8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"bits": 4}, "an unknown program"),
    ],
)
def test_a_config_of_quantized_weights_is_refused(bases, tmp_path, settings, name):
    model = shutil.copytree(bases / "llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"quantization_config": settings, "_name_or_path": "owner/original"}
    (model / "config.json").write_text(json.dumps(config))
    message = f"config.json: the weights are quantized by {name} (quantization_config)"
    fails(message, "inspect", model)
    fails("Open the original model (perhaps owner/original)", "plan", model)


@pytest.mark.parametrize(
    ("end", "name"), [("qweight", "GPTQ"), ("SCB", "bitsandbytes"), ("weight_scale_inv", "FP8")]
)
def test_tensors_of_quantized_weights_are_refused(bases, tmp_path, end, name):
    model = shutil.copytree(bases / "llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.layers.0.mlp.up_proj.{end}"] = np.zeros(4, np.int32)
    save_file(tensors, model / "model.safetensors")
    fails(f"up_proj.{end} belongs to weights that are quantized by {name}", "inspect", model)
