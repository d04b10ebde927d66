"""Order of processing and how it is cut into blocks."""

import pytest
import torch

from hf_spqr.methods.order import activation_order, blocks, plan_by_energy, plan_in_place

SHAPES = [(64, 16, 1), (100, 16, 2), (300, 128, 2), (333, -1, 1), (20, 32, 1), (129, 8, 2), (1, 16, 1), (40, 16, 2)]


def plans(columns, group_size, per_unit):
    torch.manual_seed(0)
    return [plan_in_place(columns, group_size, per_unit), plan_by_energy(torch.rand(columns), group_size, per_unit)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_column_once_and_groups_stay_whole(shape):
    columns, group_size, per_unit = shape
    width = columns if group_size < 0 else group_size
    for plan in plans(*shape):
        assert plan.columns.sort().values.tolist() == list(range(columns))
        position = 0
        for unit in plan.units:
            assert 1 <= len(unit) <= per_unit
            assert len({group.index // per_unit for group in unit}) == 1
            for group in unit:
                assert group.start == position
                position = group.stop
                stored = plan.columns[group.start : group.stop].sort().values
                first = group.index * width
                assert stored.tolist() == list(range(first, min(first + width, columns)))
        assert position == columns


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_cover_the_way_in_order(shape):
    for plan in plans(*shape):
        position, due = 0, []
        for start, stop, chunks in blocks(plan):
            assert start == position and stop - start <= 256
            for first, last, unit, place in chunks:
                assert first == position and 0 < last - first <= 32
                if unit is not None:
                    # Its columns must be up to date: in this block, or all beyond the blocks before it.
                    assert unit[0].start == first and (unit[-1].stop <= stop or first == start)
                    due.append(unit)
                group = due[-1][place]
                assert group.start <= first and last <= group.stop
                position = last
            assert position == stop
        assert due == plan.units


def test_energy_comes_first():
    plan = plan_by_energy(torch.tensor([1.0, 2, 3, 4, 50, 6, 7, 8] * 8).repeat(2), 8, 1)
    assert plan.columns[:3].tolist() == [4, 7, 6]
    hot = torch.ones(64)
    hot[40] = 9
    assert plan_by_energy(hot, 16, 1).columns[0] == 40
    assert activation_order(torch.tensor([1.0, 3.0, 3.0])).tolist() == [1, 2, 0]
