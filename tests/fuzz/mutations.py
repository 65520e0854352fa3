"""Seeded mutations of files. Each takes a random generator and bytes, and returns other bytes."""

import copy
import json
import random
import re
import shutil
import struct

# Numbers that overflow, wrap round or ask for more than a machine has.
_SIZES = (0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
# Texts that stand in JSON as they are: most are no JSON that `json.dumps` writes.
_RAW = {
    "@nan@": "NaN",
    "@infinity@": "-Infinity",
    "@huge@": "1e999",
    "@digits@": "1" + "0" * 5000,
    "@deep@": "[" * 100_000 + "]" * 100_000,
    "@deep dict@": '{"a":' * 3000 + "1" + "}" * 3000,
    "@surrogate@": '"\\ud800"',
    "@open@": "[1, 2",
}
_ODD = (
    *(None, True, False, -1, 0, 1, 3, 1.5, -0.0, 1e308, 2**31, 2**63, 2**64, 10**30),
    *("", "x", "\x00", "1", "ä\u2028", "x" * 70_000, [], {}, [[]], [1], ["a"], {"a": 1}, [None]),
    *("../outside/victim", "/etc/hostname", "..", ".", "a/../../outside/victim", "C:\\victim"),
    *_RAW,
)


def flip_bits(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def truncate(rng, data):
    return data[: rng.choice((0, 1, 8, len(data) - 1, rng.randrange(len(data))))]


def overwrite(rng, data):
    """Zeros, ones or noise over a span; a span cut out, or put in."""
    at, count = _place(rng, data), rng.choice((1, 4, 16, 300))
    new = rng.choice((b"\0" * count, b"\xff" * count, rng.randbytes(count)))
    return data[:at] + rng.choice((new, b"", data[at : at + count] * 2)) + data[at + count :]


def resize(rng, data):
    """An extreme integer at a place where lengths may stand."""
    at, code = _place(rng, data), rng.choice(("<I", "<Q", ">I", ">Q", "<H"))
    number = rng.choice((*_SIZES, len(data), len(data) - 1, rng.randrange(2**20)))
    new = struct.pack(code, number % 2 ** (8 * struct.calcsize(code)))
    return data[:at] + new + data[at + len(new) :]


def swap_rows(rng, data):
    """Two spans of equal length change places."""
    size = rng.choice((1, 4, 16, 64, 256))
    one, other = (rng.randrange(max(1, len(data) // size)) * size for _ in range(2))
    rows = {one: data[other : other + size], other: data[one : one + size]}
    for at in sorted(rows, reverse=True):
        data = data[:at] + rows[at] + data[at + size :]
    return data


def _place(rng, data):
    """Any place, but every other time near the beginning, where headers are."""
    return rng.randrange(max(1, min(len(data), rng.choice((16, 512, 2**40)))))


def edit_json(rng, data):
    """A value of another type or size, a key that is missing, new, twice there or renamed."""
    try:
        tree = json.loads(data)
    except ValueError:
        return overwrite(rng, data)
    for _ in range(rng.choice((1, 1, 1, 2))):
        tree = _edited(rng, copy.deepcopy(tree))
    text = json.dumps(tree)
    for word, raw in _RAW.items():
        text = text.replace(json.dumps(word), raw)
    return text.encode()


def swap_values(rng, data):
    """Two values of a JSON object or list change places."""
    tree = json.loads(data)
    _, node = rng.choice([(k, n) for k, n in _nodes(tree) if len(n) > 1] or [(None, tree)])
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if len(keys) > 1:
        one, other = rng.sample(keys, 2)
        node[one], node[other] = node[other], node[one]
    return json.dumps(tree).encode()


def _nodes(tree, key=None):
    """All objects and lists that are not empty, each with its key."""
    if isinstance(tree, (dict, list)) and tree:
        yield key, tree
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _nodes(value, name)


def _edited(rng, tree):
    if rng.random() < 0.03 or not isinstance(tree, (dict, list)) or not tree:
        return rng.choice(_ODD)
    node = rng.choice([node for _, node in _nodes(tree)][: rng.choice((1, 8, 10_000))])
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    action = rng.random()
    if action < 0.6:
        node[key] = rng.choice(_ODD)
    elif action < 0.75 and isinstance(node[key], int):
        node[key] = node[key] + rng.choice((-1, 1, 2, -node[key] - 1, 2**20, 2**33))
    elif action < 0.85:
        del node[key]
    elif isinstance(node, dict):
        node[rng.choice((f"{key}x", "x", "", "\ud800", f"../{key}"))] = node.pop(key)
    else:
        node.append(node[key])
    return tree


def edit_lines(rng, data):
    """A JSON edit of one line."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = edit_json(rng, lines[at])
    return b"\n".join(lines)


def edit_safetensors(rng, data):
    """A JSON edit of the header; its length is right."""
    size = int.from_bytes(data[:8], "little")
    change = rng.choice((edit_json, edit_json, swap_values))
    header = change(rng, data[8 : 8 + size])
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def edit_gguf(rng, data):
    """Another type, length or value behind a key of the metadata or the name of a tensor."""
    keys = rb"(general|tokenizer|llama)\.[\w.]+|blk\.\d\.\w+\.weight|token_embd.weight"
    found = rng.choice(list(re.finditer(keys, data)))
    at = rng.choice((found.end(), found.end() + 4, found.end() + 12, found.start() - 8))
    code = rng.choice(("<I", "<Q", "<f", "<B"))
    values = {"<f": (0.0, float("nan"), float("inf"), -1.0), "<B": range(32)}
    near = (*range(40), *_SIZES)
    number = rng.choice(tuple(values.get(code, near)))
    if code not in values:
        number %= 2 ** (8 * struct.calcsize(code))
    new = struct.pack(code, number)
    return data[:at] + new + data[at + len(new) :]


_NPY = (
    *("'|O'", "'<f8'", "'<i8'", "'>i4'", "'S5'", "'V8'", "[('a', '<i4')]", "'<U2147483647'"),
    *("None", "3", "'<M8[s]'", "'?'", "'<c16'", "('<i4', (2,))", "{'names': ['a']}", "'\\ud800'"),
)
_SHAPES = ("(-1, 4)", "(2**62, 4)", "(4611686018427387904, 4)", "()", "(0, 4)", "4", "(1.5, 2)")
_SHAPES += ("(True, 8)", "(None,)", "((" * 90 + "))" * 90, "(99999999999999999999999, 4)")


def edit_npy(rng, data):
    """Another dtype, shape or order in the header."""
    size = int.from_bytes(data[8:10], "little")
    text = data[10 : 10 + size].decode("latin1")
    change = rng.randrange(4)
    if change == 0:
        text = re.sub(r"'descr': '[^']*'", lambda _: f"'descr': {rng.choice(_NPY)}", text)
    elif change == 1:
        text = re.sub(r"\([\d, ]*\)", lambda _: rng.choice(_SHAPES), text)
    elif change == 2:
        text = text.replace("False", rng.choice(("True", "3", "None", "[]")))
    else:
        text = overwrite(rng, text.encode("latin1")).decode("latin1")
    head = text.encode("latin1")[:60_000]
    return data[:8] + len(head).to_bytes(2, "little") + head + data[10 + size :]


def generator(*words):
    """A generator that depends on these words only."""
    return random.Random(":".join(map(str, words)))


def on(pattern, *changes):
    """A mutation of a random file among those of a pattern."""

    def mutate(rng, directory):
        files = sorted(f for f in directory.glob(pattern) if f.is_file() and f.stat().st_size)
        file = rng.choice(files)
        data = rng.choice(changes)(rng, file.read_bytes())
        file.unlink()  # the old file may still be mapped
        file.write_bytes(data)

    return mutate


def on_bytes(pattern):
    """The mutations that know nothing about the format."""
    return {
        "bit flips": on(pattern, flip_bits),
        "truncation": on(pattern, truncate),
        "bytes": on(pattern, overwrite),
        "lengths": on(pattern, resize),
        "swapped rows": on(pattern, swap_rows),
    }


def on_json(pattern):
    return on(pattern, edit_json, edit_json, edit_json, flip_bits, truncate)


def plant_link(path, outside):
    """Puts a link to something outside where a file or a directory is."""
    if path.is_dir():
        shutil.rmtree(path)
        path.symlink_to(outside)
        return
    path.unlink(missing_ok=True)
    path.symlink_to(outside / "victim")
