import pytest

from vit_jax.plan import hlo
from vit_jax.plan.hlo import Collective

LOOP = """\
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,4]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %f = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  ROOT %ar = (f32[8,4]{1,0:T(8,128)}, /*index=1*/bf16[16]{0}) all-reduce(%f, %y), channel_id=1, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%fused (x: f32[8,4]) -> f32[8,4] {
  %x.1 = f32[8,4]{1,0} parameter(0)
  ROOT %m = f32[8,4]{1,0} multiply(%x.1, %x.1), backend_config={"estimated_cycles":"7"}
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(256)} constant(24)
  %p.1 = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[8,4]) -> f32[32,4] {
  %x.2 = f32[8,4]{1,0} parameter(0)
  %c = f32[8,4]{1,0} copy(%x.2), backend_config={"estimated_cycles":"10"}
  %loop = (s32[], f32[8,4]{1,0}) while(%c), condition=%condition, body=%body
  ROOT %ag = f32[32,4]{1,0} all-gather(%c), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
}
"""


def of_loop(text: str = LOOP) -> tuple[Collective, Collective]:
    """The collective in the loop, and the one after it."""
    found = {collective.kind: collective for collective in hlo.parse(text).collectives}
    return found["all-reduce"], found["all-gather"]


def entry(*instructions: str, before: str = "") -> hlo.Program:
    body = "".join(f"  {instruction}\n" for instruction in instructions)
    return hlo.parse(f"HloModule m\n\n{before}\nENTRY %main (x: f32[4]) -> f32[4] {{\n{body}}}\n")


def test_instructions_in_a_loop_count_once_per_iteration():
    reduced, gathered = of_loop()
    assert (reduced.times, gathered.times) == (24, 1)


def test_cycles_count_all_iterations_but_not_the_insides_of_fusions():
    program = hlo.parse(LOOP)
    assert program.cycles == 10 + 24 * 100


def test_bytes_are_counted_by_dtype():
    reduced, gathered = of_loop()
    assert dict(reduced.bytes_by_dtype) == {"f32": 8 * 4 * 4, "bf16": 16 * 2}
    assert dict(gathered.bytes_by_dtype) == {"f32": 32 * 4 * 4}


def test_total_bytes_adds_up_iterations():
    totals = hlo.total_bytes(hlo.parse(LOOP).collectives)
    assert totals == {
        "all-reduce": {"count": 24, "f32": 24 * 128, "bf16": 24 * 32},
        "all-gather": {"count": 1, "f32": 512},
    }


def test_a_loop_with_another_condition_counts_once_and_is_reported():
    program = hlo.parse(LOOP.replace("constant(24)", "parameter(1)"))
    assert {collective.times for collective in program.collectives} == {1}
    assert (program.num_loops, program.num_unknown_loops) == (1, 1)


def test_the_compilers_own_trip_count_is_believed():
    text = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert of_loop(text)[0].times == 5


def test_loops_within_loops_multiply():
    outer = """\
%outer (p: f32[4]) -> f32[4] {
  ROOT %w = f32[4]{0} while(%p), condition=%condition, body=%body
}
"""
    text = LOOP.replace("ENTRY", outer + "\nENTRY").replace(
        "ENTRY %main (x: f32[8,4]) -> f32[32,4] {\n",
        "ENTRY %main (x: f32[8,4]) -> f32[32,4] {\n  %n = f32[4]{0} while(%x), condition=%condition, body=%outer\n",
    )
    assert of_loop(text)[0].times == 24 * 24


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,256]<=[512]", 256),
        ("[8,64]<=[64,8]T(1,0)", 64),
        ("mesh['data'=64,'model'=8] {'data'}", 64),
        ("mesh['data'=64,'model'=8] {'data','model'}", 512),
    ],
)
def test_group_sizes_in_all_spellings(groups, size):
    program = entry(f"ROOT %r = f32[4]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add")
    assert program.collectives[0].group_size == size


def test_a_reduce_scatter_sums_the_whole_array():
    program = entry("ROOT %r = f32[4]{0} reduce-scatter(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}")
    assert program.collectives[0].num_bytes == 8 * 16


def test_an_all_reduce_in_a_scattering_fusion_is_a_reduce_scatter():
    fused = """\
%all-reduce-scatter (x: bf16[8,16]) -> bf16[2,16] {
  %x.1 = bf16[8,16]{1,0} parameter(0)
  %ar = bf16[8,16]{1,0} all-reduce(%x.1), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = bf16[2,16]{1,0} dynamic-slice(%ar, %i), dynamic_slice_sizes={2,16}
}
"""
    program = entry("ROOT %f = bf16[2,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter", before=fused)
    assert program.collectives == (Collective("reduce-scatter", (("bf16", 8 * 16 * 2),), 4),)


def test_a_started_gather_counts_its_result_and_overlaps():
    program = entry(
        "%s = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}",
        "ROOT %d = f32[16]{0} all-gather-done(%s)",
    )
    assert program.collectives == (Collective("all-gather", (("f32", 64),), 4, overlapped=True),)


def test_an_asynchronous_collective_in_several_fusions_is_one():
    fused = """\
%async_collective_fusion.{n} (x: f32[4]) -> f32[16] {{
  %x.{n} = f32[4]{{0}} parameter(0)
  ROOT %ag.{n} = f32[16]{{0}} all-gather(%x.{n}), channel_id=9, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
}}
"""
    program = entry(
        "%a = f32[16]{0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1",
        "ROOT %b = f32[16]{0} fusion(%a), kind=kCustom, calls=%async_collective_fusion.2",
        before=fused.format(n=1) + "\n" + fused.format(n=2),
    )
    assert program.collectives == (Collective("all-gather", (("f32", 64),), 4, overlapped=True),)


SEND = """\
%send.{n} = (bf16[96,8,128]{{2,1,0:T(8,128)(2,1)}}, u32[], token[]) send(%x, %after), channel_id={n}, \
is_host_transfer=true, frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_target="{{1,2}}x{{0:7}}",_xla_megascale_transfer_type="{kind}"}}"""


def test_sends_to_other_slices_are_a_separate_exchange():
    program = entry(
        SEND.format(n=1, kind="ALL_REDUCE"),
        SEND.format(n=2, kind="ALL_GATHER"),
        "ROOT %r = bf16[96,8,128]{2,1,0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add",
    )
    num_bytes = 96 * 8 * 128 * 2
    assert hlo.total_bytes(program.collectives) == {
        "all-reduce between slices": {"count": 1, "bf16": num_bytes},
        "all-gather between slices": {"count": 1, "bf16": num_bytes},
        "all-reduce": {"count": 1, "bf16": num_bytes},
    }
    assert program.num_unknown_operations == 2


def test_a_transfer_to_the_host_is_not_an_exchange_between_slices():
    send = SEND.format(n=1, kind="ALL_REDUCE").replace("xla_megascale_runtime", "tf_rendezvous")
    assert entry(send).collectives == ()


def test_custom_calls_count_as_unknown_operations():
    call = '%c = f32[4]{0} custom-call(%x), custom_call_target="ConcatBitcast"'
    assert entry(call, "ROOT %d = f32[4]{0} copy(%c)").num_unknown_operations == 1


def test_a_program_without_collectives_and_loops_has_none():
    assert entry("ROOT %c = f32[4]{0} copy(%x)") == hlo.Program((), 0, 0, 0, 0)
