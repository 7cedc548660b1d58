"""torchvision's operators have rules by name; here they are played by operators of the same name and shape."""

import pytest
import rules_table
import torch
from torch import nn

import secateur as sc


class RegionHead(nn.Module):
    """A feature map, regions of it, and a linear head: the shape of a two-stage detector."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 16, 3)
        self.box = nn.Linear(16 * 4, 20)
        self.out = nn.Linear(20, 5)

    def forward(self, x, rois):
        regions = torch.ops.torchvision.roi_align(torch.relu(self.features(x)), rois, 1.0, 2, 2)
        return self.out(torch.relu(self.box(regions.flatten(1))))


@pytest.mark.skipif(not rules_table.PLAYED, reason="torchvision has its own operators here")
def test_channels_pass_through_roi_align():
    rois = torch.tensor([[0.0, 0, 0, 4, 4], [1.0, 1, 1, 5, 5], [0.0, 2, 2, 6, 6]])
    example = (torch.randn(2, 3, 9, 9), rois)
    model = RegionHead().eval()
    plan = sc.plan(model, example, target={"sparsity": 0.3}, scope="local")
    assert set(plan.groups) == {"features", "box"}
    cut = plan.apply(model)
    assert cut.features.out_channels < 16
    assert plan.certificate.max_abs_error <= 1e-5
