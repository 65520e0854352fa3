"""The theory of NormalFloat quantization: theory/lq_lora §8.1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.kernels import normal_float
from lordjax.kernels.normal_float import BITS, SCALE_DTYPES, Format

# One for each number of bits and each type of scales.
FORMS = [
    Format(2, 8, "bfloat16", 64, 4),
    Format(3, 2, "float32", 64, 4),
    Format(4, 3, "float16", 64, 4),
    Format(8, 4, "bfloat16", 64, 4),
]
every_form = pytest.mark.parametrize("form", FORMS, ids=str)
every_bits = pytest.mark.parametrize("bits", BITS)
every_scale_dtype = pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)

# The table that bitsandbytes has in its source.
BITSANDBYTES = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def normal(count, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=count), jnp.float32)


# Compiled, to save time; that this changes nothing is tested below.
quantize = jax.jit(normal_float.quantize, static_argnums=1)
dequantize = jax.jit(normal_float.dequantize, static_argnums=1)
encode = jax.jit(normal_float.quantize_packed, static_argnums=1)
decode = jax.jit(normal_float.dequantize_packed, static_argnums=(1, 2))
pack = jax.jit(normal_float.pack, static_argnums=1)
unpack = jax.jit(normal_float.unpack, static_argnums=(1, 2))


@functools.partial(jax.jit, static_argnums=1)
def round_trip(x, form):
    return normal_float.dequantize_packed(normal_float.quantize_packed(x, form), form, len(x))


@functools.partial(jax.jit, static_argnums=(1, 2))
def with_own_scales(x, bits, block):
    scales = normal_float.block_scales(x, block).repeat(block)
    return jnp.asarray(normal_float.levels(bits))[normal_float.nearest(x / scales, bits)] * scales


def wide(x):
    return np.asarray(x, np.float64)


def relative_mse(x, y):
    return np.sum((wide(x) - wide(y)) ** 2) / np.sum(wide(x) ** 2)


def scales_of(quantized, form):
    return normal_float.dequantize_scales(
        quantized.scales, quantized.supers, quantized.offset, form
    )


def assert_same_bits(actual, expected):
    for have, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        have, want = np.asarray(have), np.asarray(want)
        assert have.dtype == want.dtype and have.shape == want.shape
        assert have.tobytes() == want.tobytes()


# --- code book -----------------------------------------------------------------------------------


@every_bits
def test_levels_rise_from_minus_one_to_one_through_zero(bits):
    table = normal_float.levels(bits)
    assert table.dtype == np.float32 and table.shape == (2**bits,)
    assert (np.diff(table) > 0).all()
    assert table[0] == -1 and table[-1] == 1 and table[2 ** (bits - 1) - 1] == 0
    with pytest.raises(ValueError, match="read-only"):  # it is shared
        table[0] = 0


@pytest.mark.parametrize(
    ("bits", "total", "squares"),
    [
        (2, 0.337915194, 2.114186678),
        (3, 0.365691358, 2.732859495),
        (4, 0.374373285, 4.280103175),
        (8, 0.377858004, 54.33361623),
    ],
)
def test_checksums_of_levels(bits, total, squares):
    table = wide(normal_float.levels(bits))
    np.testing.assert_allclose(table.sum(), total, atol=1e-6)
    np.testing.assert_allclose((table**2).sum(), squares, rtol=1e-7)


def test_four_bits_are_those_of_bitsandbytes():
    np.testing.assert_allclose(normal_float.levels(4), BITSANDBYTES, rtol=0, atol=2e-7)


def test_levels_next_to_zero_and_to_the_ends_of_eight_bits():
    table = normal_float.levels(8)
    inner = [-0.9736547, -0.00499499, 0.00495597, 0.97385176]
    np.testing.assert_allclose(table[[1, 126, 128, 254]], inner, atol=1e-7)
    gaps = np.diff(wide(table))
    np.testing.assert_allclose([gaps.min(), gaps.max()], [0.004956, 0.026345], atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3])
def test_positive_levels_recur_with_one_bit_more(bits):
    assert set(normal_float.levels(bits)[2 ** (bits - 1) :]) <= set(normal_float.levels(bits + 1))
    assert not set(normal_float.levels(bits)[1 : 2 ** (bits - 1) - 1]) & set(
        normal_float.levels(bits + 1)
    )


# --- rounding ------------------------------------------------------------------------------------


@every_bits
def test_nearest_level(bits):
    x = jnp.asarray(np.random.default_rng(0).uniform(-1.2, 1.2, 5000), jnp.float32)
    codes = normal_float.nearest(x, bits)
    assert codes.dtype == jnp.uint8
    distances = np.abs(wide(x)[:, None] - wide(normal_float.levels(bits)))
    chosen = distances[np.arange(len(x)), np.asarray(codes)]
    # A midpoint is rounded to float32.
    np.testing.assert_allclose(chosen, distances.min(axis=1), rtol=0, atol=1e-7)
    assert len(np.unique(codes)) == 2**bits


@every_bits
def test_levels_are_their_own_nearest(bits):
    np.testing.assert_array_equal(
        normal_float.nearest(normal_float.levels(bits), bits), np.arange(2**bits)
    )


@every_bits
def test_a_midpoint_goes_to_the_lower_code(bits):
    table = normal_float.levels(bits)
    middles = (table[1:] + table[:-1]) / 2  # halving is exact
    np.testing.assert_array_equal(normal_float.nearest(middles, bits), np.arange(2**bits - 1))
    above = np.nextafter(middles, np.float32(2))
    np.testing.assert_array_equal(normal_float.nearest(above, bits), np.arange(1, 2**bits))


@every_bits
def test_what_is_out_of_range_saturates(bits):
    x = jnp.array([-jnp.inf, -10.0, -1.001, 1.001, 10.0, jnp.inf])
    last = 2**bits - 1
    np.testing.assert_array_equal(normal_float.nearest(x, bits), [0, 0, 0, last, last, last])


# --- scales --------------------------------------------------------------------------------------


@every_bits
def test_zeros_and_extremes_of_an_unquantised_scale_are_exact(bits):
    # A block alone: its scale is the offset.
    x = jnp.array([0.0, -0.7312, 0.1, 0.7312, -0.0, 0.3])
    y = round_trip(x, Format(bits, block=6))
    np.testing.assert_array_equal(y[jnp.array([0, 1, 3, 4])], [0, x[1], x[3], 0])


@every_form
def test_zeros_stay_zeros_for_any_scale(form):
    y = np.asarray(round_trip(jnp.where(jnp.arange(3000) % 3, normal(3000), 0), form))
    np.testing.assert_array_equal(y[::3], 0)
    assert np.count_nonzero(y) > 500


@every_bits
@pytest.mark.parametrize("factor", [2.0**-20, 0.25, 2.0**30])
def test_a_power_of_two_is_carried_through(bits, factor):
    form, x = Format(bits, block=32, scale_block=16), normal(5000)
    once, scaled = quantize(x, form), quantize(factor * x, form)
    assert_same_bits((scaled.codes, scaled.scales), (once.codes, once.scales))
    assert_same_bits(dequantize(scaled, form), factor * dequantize(once, form))


def test_one_scale_per_block_is_its_largest_magnitude():
    x = jnp.array([1.0, -3.0, 2.0, 0.5, 0.0, -0.25, 7.0])
    np.testing.assert_array_equal(normal_float.block_scales(x, 3), [3, 0.5, 7])


@every_scale_dtype
@every_bits
def test_bounds_of_quantised_scales(bits, scale_dtype):
    form = Format(4, bits, scale_dtype, 16, 64)
    scales = jnp.abs(normal(1000)) + 0.5
    codes, supers, offset = jax.jit(normal_float.quantize_scales, static_argnums=1)(scales, form)
    again = wide(normal_float.dequantize_scales(codes, supers, offset, form))
    exact, top = wide(scales), wide(supers).repeat(64)[:1000]
    assert supers.dtype == scale_dtype
    assert codes.dtype == jnp.uint8 and np.asarray(codes).max() == 2**bits - 1
    slack = 1e-6  # float32
    assert (again >= wide(offset)).all() and (again <= offset + top + slack).all()
    cast = top * float(jnp.finfo(scale_dtype).eps)
    assert (np.abs(again - exact) <= top / (2 * (2**bits - 1)) + cast + slack).all()
    assert again[exact.argmin()] == offset == exact.min()


def test_eight_bits_of_scales_cost_less_than_a_thousandth():
    x = normal(2**19)
    once = relative_mse(x, with_own_scales(x, 3, 64))
    twice = relative_mse(x, round_trip(x, Format(3)))
    assert once != twice
    np.testing.assert_allclose(twice, once, rtol=1e-3)


@every_form
def test_encoding_again_for_the_same_scales_changes_nothing(form):
    quantized = quantize(normal(3000), form)
    again = normal_float.round_to(dequantize(quantized, form), quantized, form)
    assert_same_bits(again, quantized)


@every_form
def test_nearest_to_the_scale_that_is_stored(form):
    x = normal(3000)
    quantized = quantize(x, form)
    scales = wide(scales_of(quantized, form)).repeat(form.block)[:3000]
    error = np.abs(wide(x) - wide(dequantize(quantized, form)))
    best = np.abs(wide(x)[:, None] - scales[:, None] * wide(normal_float.levels(form.bits))).min(
        axis=1
    )
    np.testing.assert_allclose(error, best, rtol=0, atol=1e-6)


# --- reference values (theory/lq_lora §1.7) ------------------------------------------------------

GOLDEN = {
    Format(4, 8, "float32", 16, 16): (
        2.2104480,
        [0, 2, 37, 38, 74, 73, 110, 107, 146, 139, 183, 170, 218, 198, 255, 223],
        [7, 8, 9, 10, 11, 12, 13, 13, 14, 14, 14, 15, 15, 15, 15, 15],
        1891,
        2.049865,
        0.0770197,
    ),
    Format(3, 4, "bfloat16", 16, 16): (
        2.203125,
        [0, 0, 2, 2, 4, 4, 6, 6, 9, 8, 11, 10, 13, 12, 15, 13],
        [3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7],
        866,
        3.786167,
        0.142258,
    ),
    Format(2, 2, "float16", 16, 16): (
        2.2109375,
        [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 2, 3, 3],
        [1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3],
        346,
        7.932280,
        0.298040,
    ),
}


@pytest.mark.parametrize("form", GOLDEN, ids=str)
def test_golden_vector(form):
    top, scales, codes, total, error, relative = GOLDEN[form]
    k = np.arange(256)
    x = jnp.asarray(np.sin(0.1 * k) * (1 + 0.01 * k), jnp.float32)
    quantized = quantize(x, form)
    own = normal_float.block_scales(x, 16)[jnp.array([0, 1, 2, 3, 15])]
    np.testing.assert_allclose(own, [1.147119, 1.160248, 1.469887, 1.474324, 3.078966], atol=1e-6)
    np.testing.assert_allclose(quantized.offset, 1.1471193, rtol=1e-7)
    np.testing.assert_allclose(wide(quantized.supers), [top], rtol=1e-7)
    np.testing.assert_array_equal(quantized.scales, scales)
    np.testing.assert_array_equal(quantized.codes[:16], codes)
    assert int(quantized.codes.astype(jnp.int32).sum()) == total
    away = np.linalg.norm(wide(x) - wide(dequantize(quantized, form)))
    np.testing.assert_allclose(away, error, rtol=1e-6)
    np.testing.assert_allclose(away / np.linalg.norm(wide(x)), relative, rtol=1e-5)


@functools.cache
def gaussian():
    return normal(2**20)


# Eight bits are known to two digits.
@pytest.mark.parametrize(
    ("bits", "expected", "tolerance"),
    [
        (2, (0.2138, 0.2679, 0.3168, 0.3593), 0.01),
        (3, (0.03028, 0.03604, 0.04063, 0.04438), 0.01),
        (4, (0.00653, 0.00763, 0.00846, 0.00914), 0.01),
        (8, (2.3e-5, 2.6e-5, 2.9e-5, 3.1e-5), 0.02),
    ],
)
def test_error_of_gaussian_values(bits, expected, tolerance):
    measured = [
        relative_mse(gaussian(), with_own_scales(gaussian(), bits, block))
        for block in (16, 32, 64, 128)
    ]
    np.testing.assert_allclose(measured, expected, rtol=tolerance)


@pytest.mark.parametrize(
    ("form", "bits"),
    [
        (Format(), 4.126953125),
        (Format(3), 3.126953125),
        (Format(8), 8.126953125),
        (Format(2, 2, "bfloat16"), 2.0322265625),
        (Format(2, 8, "float32", 16, 16), 2.625),
        (Format(8, 8, "float32", 16, 16), 8.625),
        (Format(4, 8, "float32", 16, 16), 4.625),
        (Format(3, 4, "bfloat16", 16, 16), 3.3125),
        (Format(2, 2, "float16", 16, 16), 2.1875),
    ],
    ids=str,
)
def test_bits_per_weight_are_those_that_are_stored(form, bits):
    assert form.bits_per_weight == bits
    count = 32 * form.block * form.scale_block  # whole words of everything
    packed = jax.eval_shape(lambda: normal_float.quantize_packed(jnp.zeros(count), form))
    *parts, offset = (part.size * part.dtype.itemsize for part in packed)
    assert offset == 4 and sum(parts) == bits * count / 8
    assert form.nbytes(count) == sum(parts) + offset


def test_grid_of_the_integer_programme():
    sizes = [form.bits_per_weight for form in normal_float.grid()]
    assert len(set(normal_float.grid())) == len(sizes) == 432 and len(set(sizes)) == 184
    assert min(sizes) == 2.0322265625 and max(sizes) == 8.625


# --- odd matrices and shapes ---------------------------------------------------------------------

ODD = {
    "zeros": jnp.zeros(640),
    "constant": jnp.full(640, -0.3),
    "one": jnp.zeros(640).at[77].set(-5.0),
    "equal scales": jnp.sign(normal(640)) * 2.0,
    "zero block": normal(640).at[64:128].set(0),
}
# The only magnitude of a block is its scale, and that is the least of all or all are equal.
EXACT = ("zeros", "constant", "equal scales")


@pytest.mark.parametrize("name", ODD)
@every_form
def test_odd_values(name, form):
    x = np.asarray(ODD[name])
    y = np.asarray(round_trip(ODD[name], form))
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[x == 0], 0)
    if name in EXACT:
        assert_same_bits(y, x)


@pytest.mark.parametrize("count", [1, 33, 65, 64 * 256 + 1, 192 * 576, 576 * 576])
def test_counts_that_nothing_divides(count):
    # Values that are levels of block scales that are all equal survive exactly.
    form = Format(3, 3, "bfloat16")
    x = 0.7 * normal_float.levels(3)[np.random.default_rng(0).integers(0, 8, count)]
    x[::64] = -0.7
    packed = encode(x, form)
    assert sum(part.nbytes for part in packed) == form.nbytes(count)
    blocks = -(-count // 64)
    assert form.blocks(count) == (blocks, -(-blocks // 256)) == (blocks, len(packed.supers))
    assert_same_bits(decode(packed, form, count), x)


def test_what_fills_up_the_last_block_does_not_count():
    form, x = Format(4, 8, "float32", 64, 4), normal(5 * 64)
    short, whole = quantize(x[:-10], form), quantize(x.at[-10:].set(0), form)
    assert_same_bits(short.codes, whole.codes[:-10])
    assert_same_bits(short[1:], whole[1:])
    # Nor does what fills up the last group of scales: five of them, in groups of four.
    assert short.offset == normal_float.block_scales(x[:-10], 64).min() > 0
    assert short.supers[1] == normal_float.block_scales(x[:-10], 64)[4] - short.offset


def test_sizes_of_a_shape_that_blocks_do_not_divide():
    # 576 x 576: 5184 scales of 64, 21 groups of 256 of them, the last with 64.
    form = Format()
    assert form.blocks(576 * 576) == (5184, 21)
    assert form.nbytes(576 * 576) == 576 * 576 // 2 + 5184 + 21 * 4 + 4
    assert form.blocks(192 * 576) == (1728, 7)
    assert form.nbytes(33) == 2 * 16 + 32 + 4 + 4  # codes and scales in words for 32


# --- packing -------------------------------------------------------------------------------------


@every_bits
@pytest.mark.parametrize("count", [0, 33, 1000])
def test_packing_is_undone(bits, count):
    codes = np.random.default_rng(count).integers(0, 2**bits, count).astype(np.uint8)
    words = pack(codes, bits)
    assert words.dtype == jnp.uint32 and words.shape == (normal_float.words_for(count, bits),)
    assert words.nbytes == -(-count // 32) * 4 * bits
    assert_same_bits(unpack(words, bits, count), codes)


def numbers(*words):
    return np.array(words, np.uint32)


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (4, np.arange(16), numbers(0x76543210, 0xFEDCBA98, 0, 0)),
        (2, np.tile(np.arange(4), 4), numbers(0xE4E4E4E4, 0)),
        (3, np.arange(32) % 8, numbers(0xAAAAAAAA, 0xCCCCCCCC, 0xF0F0F0F0)),
        (8, [0, 1, 2, 3, 252, 253, 254, 255], numbers(0x03020100, 0xFFFEFDFC, *[0] * 6)),
    ],
)
def test_words_of_the_authors(bits, codes, words):
    assert_same_bits(pack(np.asarray(codes, np.uint8), bits), words)


def unpack_legacy(data, bits, padding):
    """Returns the uint8 codes of the layout in which the authors of LQ-LoRA save checkpoints.

    The codes form one bit stream, each with its highest bit first. Bytes are filled from the lowest
    bit. The last ``padding`` bits are unused.
    """
    stream = np.unpackbits(np.asarray(data, np.uint8), bitorder="little")
    count, rest = divmod(len(stream) - padding, bits)
    if not 0 <= padding < 8 or rest or count < 0:
        raise ValueError(
            f"{len(stream)} bits less a padding of {padding} are no whole number of {bits}-bit "
            "codes; were both saved with this matrix?"
        )
    places = stream[: count * bits].reshape(count, bits) << np.arange(bits)[::-1].astype(np.uint8)
    return places.sum(axis=1, dtype=np.uint8)


@pytest.mark.parametrize(
    ("bits", "codes", "data", "padding"),
    [
        (4, [1, 2, 3, 4, 5], [72, 44, 10], 4),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [148, 211, 29], 0),
        (2, [0, 1, 2, 3], [216], 0),
    ],
)
def test_legacy_layout_of_the_authors(bits, codes, data, padding):
    found = unpack_legacy(np.array(data, np.uint8), bits, padding)
    assert_same_bits(found, np.array(codes, np.uint8))
    words = pack(found, bits)  # and on to the layout of now
    assert_same_bits(unpack(words, bits, len(codes)), found)


@pytest.mark.parametrize("padding", [-1, 1, 8])
def test_legacy_layout_with_wrong_padding(padding):
    with pytest.raises(ValueError, match="padding"):
        unpack_legacy(np.array([72, 44, 10], np.uint8), 4, padding)


@every_bits
def test_packing_does_not_depend_on_the_width_of_integers(bits):
    with jax.enable_x64(True):
        words = pack(np.arange(2**bits), bits)
        assert words.dtype == jnp.uint32
        assert_same_bits(unpack(words, bits, 2**bits), np.arange(2**bits, dtype=np.uint8))


# --- compiled ------------------------------------------------------------------------------------


@pytest.mark.quick("3-bfloat16")
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", [3, 8])
def test_compiled_is_bit_for_bit_what_was_encoded(bits, scale_dtype):
    # Formats whose scales a fused multiply-add would round otherwise.
    form, x = Format(bits, 8, scale_dtype, 16, 64), normal(5001)
    eager = normal_float.quantize(x, form)
    values, packed = normal_float.dequantize(eager, form), normal_float.pack_codes(eager, form)
    assert_same_bits(encode(x, form), packed)
    assert_same_bits(decode(packed, form, len(x)), values)
    assert_same_bits(round_trip(x, form), values)


def test_narrow_values_are_quantised_in_float32():
    x = normal(3000).astype(jnp.bfloat16)
    assert_same_bits(encode(x, FORMS[1]), encode(x.astype(jnp.float32), FORMS[1]))


# --- names ---------------------------------------------------------------------------------------


def test_a_format_is_read_from_its_name():
    assert str(Format()) == "nf4-8-float32-64-256"
    for form in normal_float.grid():
        assert Format.parse(str(form)) == form
    assert Format.parse("nf4") == Format()
    assert Format.parse("nf3-4-bfloat16") == Format(3, 4, "bfloat16")
    assert Format.parse("nf2-2-float16-32") == Format(2, 2, "float16", 32)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "nf",
        "nf5",
        "nf-4",
        "nfx",
        "int4",
        "nf4-",
        "nf4-1",
        "nf4-8-float64",
        "nf4-8-float32-0",
        "nf4-8-float32-64--1",
        "nf4-8-float32-64-256-1",
        "nf4.0",
    ],
)
def test_a_name_of_no_format_is_an_error(text):
    with pytest.raises(ValueError, match=rf"^'{text}' is no format; .* such as nf4-8-float32-64"):
        Format.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "bits and scale_bits"),
        ({"scale_bits": 16}, "bits and scale_bits"),
        ({"scale_dtype": "float64"}, "scale_dtype"),
        ({"block": 0}, "at least 1"),
        ({"scale_block": -1}, "at least 1"),
    ],
)
def test_a_format_that_does_not_exist_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        Format(**fields)
