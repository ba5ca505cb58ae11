"""A few elements of each of many tensors, side by side, in one launch."""

from collections.abc import Sequence

import torch

from . import dispatch


class Samples:
    """Elements of tensors that stay where they are.

    Args:
        views: one-dimensional integer views of one dtype and device, none empty.
        kernels: "auto", "triton", "torch" or None (see `dispatch`).
    """

    def __init__(self, views: Sequence[torch.Tensor], kernels=None):
        self.views = list(views)
        self.where = None
        if dispatch.select("samples", views[0].device, kernels) == "triton":
            first, size = views[0].data_ptr(), views[0].element_size()
            table = [((view.data_ptr() - first) // size, view.stride(0), len(view)) for view in views]
            self.where = torch.tensor(table, device=views[0].device)

    def read(self) -> torch.Tensor:
        """The elements as they are now, `[n]`: those of each view after another, behind which there may be zeros."""
        if self.where is None:
            return torch.cat(self.views)
        from .samples_triton import launch

        return launch(self.views[0], self.where, max(map(len, self.views)))
