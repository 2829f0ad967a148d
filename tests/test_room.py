import pytest
import torch
from helpers import F64, seeded

import hessfunc as hf
from hessfunc._room import HUGE, LARGE, room


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_bytes", [LARGE // 2, LARGE, 3 * LARGE])
def test_memory_has_the_shape_and_the_dtype_and_can_be_written_to(dtype, num_bytes):
    shape = (2, num_bytes // 2 // dtype.itemsize)
    memory = room(torch.zeros(1, dtype=F64), shape, dtype=dtype)
    assert (memory.shape, memory.dtype, memory.device.type) == (shape, dtype, "cpu")
    assert memory.is_contiguous()
    memory.fill_(3)
    assert float(memory[1, -1]) == 3
    assert memory.untyped_storage().nbytes() == num_bytes
    assert memory.untyped_storage().resizable() == (num_bytes < LARGE), "torch's own memory is"


def test_other_devices_and_the_largest_blocks_have_memory_by_torch():
    assert room(torch.zeros(1), (HUGE + 1,), dtype=torch.uint8).untyped_storage().resizable()
    assert room(torch.zeros(1, device="meta"), (2, LARGE)).device.type == "meta"
    assert room(torch.zeros(1, dtype=F64), (3,)).dtype == F64


def test_products_of_many_rows_are_those_of_single_ones_where_their_memory_is_large():
    x = torch.randn(5, 300, generator=seeded(1))
    params = {"w": torch.randn(300, 300, generator=seeded(2)) / 10}
    H = hf.hessian(lambda p, x: torch.tanh(x @ p["w"]).square().sum(), params, (x,))
    rows = torch.randn(16, H.size, generator=seeded(3))
    expected = torch.stack([H.vector(row) for row in rows])
    assert expected.untyped_storage().nbytes() >= LARGE
    for _ in range(3):  # eagerly, traced, and from residuals
        torch.testing.assert_close(H.rows(rows), expected, rtol=1e-4, atol=1e-4)
