"""Elements of many tensors in one launch: those that `torch.cat` gives, read anew every time."""

import pytest
import torch

from handloom.kernels.samples import Samples


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_the_kernel_reads_what_stands_there_now(dtype):
    generator = torch.Generator().manual_seed(0)
    held = [torch.randint(100, (size,), generator=generator).to(dtype) for size in (1, 9, 500)]
    views = [held[0], held[1].as_strided((5,), (2,), 0), held[2].as_strided((6,), (71,), 3)]
    samples = Samples(views, kernels="triton")
    for _ in range(2):
        parts = samples.read().view(3, 8)
        for part, view in zip(parts, views, strict=True):
            assert part[: len(view)].tolist() == view.tolist()
            assert not part[len(view) :].any()
        held[2].add_(1)
        held[0].zero_()


def test_in_torch_the_elements_stand_one_after_another():
    views = [torch.tensor([1, 2]), torch.tensor([3, 0, 4]).as_strided((2,), (2,))]
    assert Samples(views, kernels="torch").read().tolist() == [1, 2, 3, 4]
