"""torchvision's operators have rules by name; here they are played by operators of the same name and shape."""

import pytest
import torch
from torch import nn

import secateur as sc

if not hasattr(torch.ops.torchvision, "roi_align"):
    _LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    _LIBRARY.define("roi_align(Tensor input, Tensor rois, float scale, int height, int width) -> Tensor")
    _LIBRARY.impl(
        "roi_align",
        lambda x, rois, scale, h, w: nn.functional.adaptive_avg_pool2d(x[rois[:, 0].long()], (h, w)),
        "CompositeExplicitAutograd",
    )


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


@pytest.mark.skipif("_LIBRARY" not in globals(), reason="torchvision has its own operators here")
def test_channels_pass_through_roi_align():
    rois = torch.tensor([[0.0, 0, 0, 4, 4], [1.0, 1, 1, 5, 5], [0.0, 2, 2, 6, 6]])
    example = (torch.randn(2, 3, 9, 9), rois)
    model = RegionHead().eval()
    plan = sc.plan(model, example, target={"sparsity": 0.3}, scope="local")
    assert set(plan.groups) == {"features", "box"}
    cut = plan.apply(model)
    assert cut.features.out_channels < 16
    assert plan.certificate.max_abs_error <= 1e-5
