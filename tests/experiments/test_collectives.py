# SPDX-License-Identifier: Apache-2.0
"""What a program sends, against counts by hand."""

import re

import pytest
from nlx_experiments import chips, collectives
from nlx_experiments.collectives import Sent

PROGRAM = """
HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}

%chunk (a: f32[8]) -> f32[8] {
  %t = bf16[4,8]{1,0} all-to-all(%a), replica_groups=[2,4]<=[8], dimensions={0}
}

%block (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8,16]{1,0} all-gather(%a), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %w = f32[8] while(%g), condition=%c, body=%chunk, turns(5)
}

%taken (a: f32[8]) -> f32[8] {
  %r = ((f32[100], f32[60]), (f32[800], f32[480]), u32[]) all-gather-start(%a), dimensions={0}
}

%never (a: f32[8]) -> f32[8] {
  %g = f32[8]{0} add(%a, %a)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%a), condition=%c, body=%block, turns(3)
  %r = (f32[10]{0}, f32[6]{0}) all-reduce(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add
  %s = ((f32[64]), f32[8], u32[]) reduce-scatter-start(%a), replica_groups=[1,8]<=[8], to_apply=%add
  %d = f32[8] reduce-scatter-done(%s)
  %p = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%a)
  %q = f32[4] collective-permute-done(%p)
  %ag = (f32[4], f32[8]) all-gather-start(%a), replica_groups={{0,1}}, dimensions={0}
  %c = f32[8] conditional(%p, %a, %a), true_computation=%taken, false_computation=%never
}
"""
PROGRAM = re.sub(r"turns\((\d)\)", r'backend_config={"known_trip_count":{"n":"\1"}}', PROGRAM)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3}}, use_global_device_ids=true", 2),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=1] {'fsdp'}, dimensions={0}", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=3] {'data','tensor'}", 6),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}, to_apply=%add", 4),
        ("replica_groups={}, to_apply=%add", 16),
        ("to_apply=%add", 16),
    ],
)
def test_groups_are_read_as_they_are_written(groups, size):
    line = f"  %g = f32[{16 * 16}]{{0}} all-gather(%a), {groups}"
    program = f"ENTRY %main (a: f32[8]) -> f32[8] {{\n{line}\n}}"
    assert collectives.sent(program, 16)["all-gather"].bytes == 4 * 16 * 16 * (size - 1) // size


def test_groups_of_another_form_are_no_guess():
    program = "ENTRY %m (a: f32[8]) -> f32[8] {\n  %g = f32[8] all-gather(%a), replica_groups=@x\n}"
    with pytest.raises(ValueError, match="groups of devices that cannot be read"):
        collectives.sent(program, 16)


def test_bytes_of_every_kind():
    assert collectives.sent(PROGRAM, 8) == {
        "all-gather": Sent(5, 3 * (8 * 16 * 4 // 2) + 8 * 4 // 2 + 1280 * 4 * 7 // 8),
        "all-to-all": Sent(15, 15 * (4 * 8 * 2 * 3 // 4)),
        "all-reduce": Sent(1, 2 * 16 * 4 * 7 // 8),
        "reduce-scatter": Sent(1, 8 * 4 * 7),
        "collective-permute": Sent(1, 4 * 4),
    }


UNTOLD = """
%less (a: s32[], n: s32[]) -> pred[] {
  ROOT %t = pred[] compare(%a, %n), direction=LT
}

%before_24 (a: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(24), backend_config={}
  ROOT %t = pred[] fusion(%i, %n), kind=kLoop, calls=%less
}

%block (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8] all-gather(%a), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%a), condition=%before_24, body=%block
}
"""


def test_turns_are_read_from_a_loops_condition():
    assert collectives.sent(UNTOLD, 2) == {"all-gather": Sent(24, 24 * 16)}
    for broken in (
        UNTOLD.replace("direction=LT", "direction=GT"),
        UNTOLD.replace("  ROOT %t = pred[] fusion", "  %m = s32[] constant(3)\n  ROOT %t = fusion"),
    ):
        assert collectives.sent(broken, 2) == {"all-gather": Sent(1, 16)}


PIECES = """
%begun (a: f32[4]) -> f32[8] {
  %g = f32[8] all-gather(%a), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}

%async_collective_fusion.3 (a: f32[4]) -> f32[8] {
  %g = f32[8] all-gather(%a), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}

%ended (a: f32[4]) -> f32[8] {
  %g = f32[8] all-gather(%a), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}

%chunk (a: f32[8]) -> f32[8] {
  %f = (f32[4], f32[8]) fusion(%a), kind=kCustom, calls=%async_collective_fusion.3
}

%block (a: f32[8]) -> f32[8] {
  %async-collective-start.1 = (f32[4], f32[8]) fusion(%a), kind=kCustom, calls=%begun
  %w = f32[8] while(%a), condition=%c, body=%chunk, turns(5)
  %async-collective-done.1 = f32[8] fusion(%w), kind=kCustom, calls=%ended
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%a), condition=%c, body=%block, turns(3)
}
"""
PIECES = re.sub(r"turns\((\d)\)", r'backend_config={"known_trip_count":{"n":"\1"}}', PIECES)


def test_what_goes_on_beside_other_work_is_sent_once():
    assert collectives.sent(PIECES, 2) == {"all-gather": Sent(3, 3 * 16)}
    assert collectives.in_loops_of_loops(PIECES) == {}
    within = PIECES.replace("calls=%async_collective_fusion.3", "calls=%begun")
    assert collectives.in_loops_of_loops(within) == {"begun": ["all-gather"]}


def test_what_a_block_exchanges_at_every_chunk_is_found():
    assert collectives.in_loops_of_loops(PROGRAM) == {"chunk": ["all-to-all"]}
    assert collectives.in_loops_of_loops(PROGRAM.replace("body=%chunk", "to_apply=%chunk")) == {}
    assert collectives.in_loops_of_loops(PROGRAM, outer=2) == {}
    assert set(collectives.in_loops_of_loops(PROGRAM, outer=0)) == {"block", "chunk"}


def test_chips_by_either_name():
    assert chips.of("TPU v5p") == chips.of("TPU v5") == chips.CHIPS["TPU v5"]
    assert chips.of("cpu") is None
