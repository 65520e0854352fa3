"""Programs as they are compiled: launches, bytes and calls, counted in their text."""

import jax
import jax.numpy as jnp
import pytest

from lordjax.runtime import hlo

WRITTEN = """HloModule jit_f, is_scheduled=true

%replace (p0: f32[64,8], p1: f32[1,8], p2: s32[]) -> f32[64,8] {
  %p0 = f32[64,8]{1,0} parameter(0)
  %p1 = f32[1,8]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %put = f32[64,8]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

%body (state: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %state = (s32[], f32[64,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[64,8]{1,0} get-tuple-element(%state), index=1
  %row = f32[1,8]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,8}
  %new = f32[64,8]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%replace
  ROOT %next = (s32[], f32[64,8]{1,0}) tuple(%i, %new)
}

%condition (state.1: (s32[], f32[64,8])) -> pred[] {
  %state.1 = (s32[], f32[64,8]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[64,8], b: f64[4,4]) -> (f32[64,8], f64[4,4]) {
  %a = f32[64,8]{1,0} parameter(0)
  %b = f64[4,4]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[64,8]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[64,8]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"64"}}
  %out = f32[64,8]{1,0} get-tuple-element(%loop), index=1
  %sum = f32[64,8]{1,0} all-reduce(%out), replica_groups={{0,1}}, to_apply=%condition
  %factor = (f64[4,4]{1,0}, s32[]) custom-call(%b), custom_call_target="cusolver_potrf_ffi"
  %lower = f64[4,4]{1,0} get-tuple-element(%factor), index=0
  %copied = f64[4,4]{1,0} copy(%lower)
  ROOT %both = (f32[64,8]{1,0}, f64[4,4]{1,0}) tuple(%sum, %copied)
}
"""


def test_everything_of_a_written_program_is_counted():
    facts = hlo.read(WRITTEN)
    assert facts.launches == {
        "dynamic-slice": 64,
        "fusion": 64,
        "all-reduce": 1,
        "custom-call": 1,
        "copy": 1,
    }
    assert facts.loops == [(64, 2.0)]
    assert facts.calls == {"cusolver_potrf_ffi": 1}
    assert facts.sent == {"all-reduce": 64 * 8 * 4}
    assert facts.copied_bytes == 4 * 4 * 8
    assert facts.unknown_loops == facts.host_transfers == 0
    # An iteration reads and writes a row, then reads it with its index and writes it in place.
    row, whole, square = 8 * 4, 64 * 8 * 4, 4 * 4 * 8
    iteration = 2 * row + (row + 4) + row
    assert facts.nbytes == 64 * iteration + 2 * whole + (2 * square + 4) + 2 * square
    assert facts.wide_bytes == (2 * square + 4) + 2 * square


def test_a_fusion_that_reads_and_replaces_a_row_moves_it_twice():
    body = """  %p0 = f32[64,8]{1,0} parameter(0)
  %p1 = f32[1,8]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %old = f32[1,8]{1,0} dynamic-slice(%p0, %p2, %p2), dynamic_slice_sizes={1,8}
  %add = f32[1,8]{1,0} add(%old, %p1)
  ROOT %put = f32[64,8]{1,0} dynamic-update-slice(%p0, %add, %p2, %p2)
"""
    plain = WRITTEN[WRITTEN.index("  %p0") : WRITTEN.index("}\n\n%body")]
    more = hlo.read(WRITTEN.replace(plain, body)).nbytes - hlo.read(WRITTEN).nbytes
    assert more == 64 * 8 * 4  # a row in each of 64 iterations


@pytest.mark.parametrize(
    ("text", "count"),
    [("f32[2,3]{1,0}", 24), ("bf16[5]", 10), ("(s32[], u4[6], pred[3])", 10), ("token[]", 0)],
)
def test_sizes_of_types(text, count):
    assert hlo.type_bytes(text) == count


def test_loops_of_real_programs_are_found():
    def program(x):
        def step(i, x):
            return jnp.sin(x @ x) + i.astype(x.dtype)

        return jax.lax.fori_loop(0, 7, step, x)

    text = jax.jit(program).lower(jnp.ones((16, 16))).compile().as_text()
    facts = hlo.read(text)
    assert [trips for trips, _ in facts.loops] == [7]
    assert facts.total_launches >= 7
    assert facts.nbytes >= 7 * 2 * 16 * 16 * 4


def test_a_text_that_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.read("HloModule empty\n")


def test_a_scatter_in_place_moves_its_updates_twice():
    """It reads and writes them; the rest of the array stays where it is."""
    scatter = "  ROOT %put = f32[64,8]{1,0} scatter(%p0, %p2, %p1), to_apply=%body\n"
    plain = WRITTEN[WRITTEN.index("  ROOT %put") : WRITTEN.index("}\n\n%body")]
    assert plain.startswith("  ROOT %put = f32[64,8]{1,0} dynamic-update-slice(%p0, %p1")
    assert hlo.read(WRITTEN.replace(plain, scatter)).nbytes == hlo.read(WRITTEN).nbytes
