"""Tiny models as other programs write them, and how they are read."""

import io
import json
import re
import zipfile

import mutations as m
import numpy as np
import tiny_gguf
from chats import make_tokenizer
from hostile_templates import TEMPLATES
from safetensors.numpy import save_file

TEXTS = ("one word", "two words\nhere", "drei W\u00f6rter, noch eins")


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 320}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **SIZES,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 0],
}
GENERATION = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "eos_token_id": 2}


def weights():
    """Tensors of a random Llama, by their names."""
    draw = np.random.default_rng(0).standard_normal
    hidden, inner, keys = 16, 24, 8
    shapes = {"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden)}
    found = {"model.embed_tokens.weight": (320, hidden), "model.norm.weight": (hidden,)}
    found["lm_head.weight"] = (320, hidden)
    for i in range(2):
        at = f"model.layers.{i}"
        found |= {f"{at}.self_attn.{name}_proj.weight": shape for name, shape in shapes.items()}
        found[f"{at}.self_attn.o_proj.weight"] = (hidden, hidden)
        found |= {f"{at}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        found[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        norms = ("input_layernorm", "post_attention_layernorm")
        found |= {f"{at}.{name}.weight": (hidden,) for name in norms}
    return {name: draw(shape).astype(np.float32) for name, shape in found.items()}


def beside(directory):
    """Writes what stands beside the weights."""
    make_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))


def safetensors(directory):
    beside(directory)
    found, index = weights(), {}
    for k, part in enumerate((list(found)[::2], list(found)[1::2]), 1):
        file = f"model-0000{k}-of-00002.safetensors"
        save_file({name: found[name] for name in part}, directory / file)
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)


def torch_file(zipped):
    def build(directory):
        import torch

        beside(directory)
        state = {name: torch.tensor(values) for name, values in weights().items()}
        file = directory / "pytorch_model.bin"
        torch.save(state, file, _use_new_zipfile_serialization=zipped)

    return build


def adapter(directory):
    (base := directory / "base").mkdir()
    safetensors(base)
    config = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4}
    config |= {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {}, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    draw, start = np.random.default_rng(1).standard_normal, "base_model.model.model.layers.0"
    shapes = {"q_proj.lora_A": (2, 16), "q_proj.lora_B": (16, 2)}
    shapes |= {"v_proj.lora_A": (3, 16), "v_proj.lora_B": (8, 3)}
    tensors = {
        f"{start}.self_attn.{name}.weight": draw(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, directory / "adapter_model.safetensors")


def read_model(directory, file=None):
    """A model as the commands open it: parameters, defaults of generation, tokenizer."""
    from lordjax.scripts.opened_model import open_model

    model = open_model(str(directory if file is None else directory / file))
    tokenizer = model.tokenizer()
    ids = [tokenizer.encode(text) for text in TEXTS]
    return {
        "config": repr(model.config),
        "defaults": repr(model.generation_defaults()),
        "shapes": {path: leaf.shape for path, leaf in model.leaves().items()},
        "params": model.params(),
        "ids": ids,
        "stops": model.stop_tokens(tokenizer),
        "chat": tokenizer.chat_template,
    }


def rezip(rng, data):
    """The same zip file with a changed member, whose checksum is right, or with other names."""
    fresh = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(fresh, "w") as new:
        target = rng.choice([*old.namelist(), *[n for n in old.namelist() if "pkl" in n] * 20])
        for name in old.namelist():
            content, packed = old.read(name), zipfile.ZIP_STORED
            if name == target:
                change = rng.choice((m.flip_bits, m.truncate, m.overwrite, m.resize, None))
                content = content * 50 if change is None else change(rng, content)
                packed = rng.choice((packed, packed, zipfile.ZIP_DEFLATED))
                name = rng.choice((name, name, name, "../../outside/victim", "x"))
            new.writestr(name, content, packed)
    return fresh.getvalue()


def gguf_sentence_piece(directory):
    import gguf

    file = tiny_gguf.write(directory / "plain.gguf", "Q8_0")
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581"]
    for key, value in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, value.contents(), value.types[0])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, 1])
    finish(writer, reader.tensors)
    file.unlink()


def finish(writer, tensors):
    """Writes tensors that a reader has found, and closes the file."""
    for tensor in tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_parts(directory):
    """A model of two files."""
    import gguf

    file = tiny_gguf.write(directory / "plain.gguf", "Q4_0")
    reader = gguf.GGUFReader(file)
    for part in range(2):
        writer = gguf.GGUFWriter(directory / f"model-0000{part + 1}-of-00002.gguf", "llama")
        for key, field in reader.fields.items():
            if part == 0 and not key.startswith("GGUF.") and key != "general.architecture":
                sub = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        finish(writer, reader.tensors[part::2])
    file.unlink()


def pair_tokenizer(directory):
    """Byte pairs in ``vocab.json`` and ``merges.txt``, as GPT-2 has them."""
    vocab = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    vocab |= {"ab": len(vocab), "<|endoftext|>": len(vocab) + 1}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\na b\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 64}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def word_tokenizer(directory):
    """Pieces of words in ``vocab.txt``, as BERT has them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "word", "##s", "##e"]
    (directory / "vocab.txt").write_text("\n".join([*words, *"abcdehinortw"]) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def read_tokenizer(directory):
    from lordjax.conversions.readers.beside_weights import DirectoryTokenizer

    tokenizer = DirectoryTokenizer(directory).tokenizer()
    return [tokenizer.encode(text) for text in TEXTS]


def chat_template(directory):
    make_tokenizer().save_pretrained(directory)


def read_chat(directory):
    from lordjax.conversions.readers.beside_weights import DirectoryTokenizer
    from lordjax.generation.chat_turns import chat_ids, turns_of

    tokenizer = DirectoryTokenizer(directory).tokenizer()
    messages = [{"role": "user", "content": "one word"}]
    return [turns_of(tokenizer), chat_ids(tokenizer, messages, str(directory))]


def edit_template(rng, data):
    """Another word of the language in the place of one, or a template that does harm."""
    if rng.random() < 0.05:
        return rng.choice(list(TEMPLATES.values())).encode()
    words = re.findall(rb"\w+|\W", data)
    at = rng.randrange(len(words))
    words[at] = rng.choice((*words, *_WORDS))
    return b"".join(words)


_WORDS = (
    *(b"{{", b"{%", b"}}", b"%}", b"{#", b"for", b"if", b"set", b"in", b"is", b"not", b"1", b"-"),
    *(b"(", b")", b"[", b"]", b"|", b"~", b"*", b"**", b"'", b"loop", b"range(9)", b"messages"),
    *(b"none", b"true", b"x", b"raise_exception('a')", b"|tojson", b"|first", b"\xff", b"include"),
)


def orbax(directory):
    from saved_models import CONFIG as OWN
    from saved_models import model

    from lordjax.conversions.exporters import hf_files
    from lordjax.conversions.exporters.orbax import orbax as export
    from lordjax.models.source import InMemory

    source = InMemory(OWN, model())
    object.__setattr__(source, "hf_config", {"model_type": "llama"})
    export(hf_files.ExportSpec(source, np.dtype("float32"), directory), directory)


def read_orbax(directory):
    from lordjax.conversions.exporters.orbax import restore_orbax

    config, params = restore_orbax(directory)
    return {"config": repr(config), "params": params}


# What other programs read in the same files


def of_safetensors(directory):
    found = []
    for file in sorted(directory.glob("*.safetensors")):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, row in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                start, end = (8 + size + at for at in row["data_offsets"])
                kind = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[row["dtype"]]
                found.append(np.frombuffer(data[start:end], kind))
    return found


def of_torch(directory):
    import torch

    state = torch.load(directory / "pytorch_model.bin", weights_only=True)
    return [tensor.numpy() for tensor in state.values()]


def of_gguf(directory):
    import gguf

    files = sorted(directory.glob("*.gguf"))
    tensors = [tensor for file in files for tensor in gguf.GGUFReader(file).tensors]
    return [gguf.dequantize(np.array(t.data), t.tensor_type) for t in tensors]
