import pytest

from torchlamp.kernels.specification import Accumulation, Grid


def test_the_largest_value_counts_lost_codes():
    assert Grid().max_value == 3.4028234663852886e38
    assert Grid(3, -6, 8, top_codes_lost=1, overflow="nan").max_value == 448
    assert Grid(10, -14, 15).max_value == 65504


def test_which_grids_have_shortcuts():
    assert Grid().is_float32
    assert Grid().has_float32_range
    assert Grid(4).has_float32_range
    assert not Grid(4).is_float32
    assert not Grid(4, overflow="saturate").has_float32_range
    assert not Grid(4, min_exponent=-14).has_float32_range


@pytest.mark.parametrize(("block", "promote"), [(0, 0), (1, -1), (2, 2)])
def test_lengths_out_of_range(block, promote):
    with pytest.raises(ValueError, match=f"block={block}, promote={promote}"):
        Accumulation(Grid(), block=block, promote=promote)
