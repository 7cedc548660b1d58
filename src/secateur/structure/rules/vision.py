"""Rules for the operators of torchvision, by name: the package itself is not needed."""

from __future__ import annotations

from secateur.structure.rules.base import Call, register
from secateur.structure.rules.lookup import BY_NUMBER
from secateur.structure.trace import Axes


@register("torchvision::roi_align", "torchvision::roi_pool")
def region(call: Call) -> list[Axes]:
    """Channels of [n, c, h, w] pooled in [k, 5] boxes -> [k, c, h, w]."""
    image, boxes = call.axes(call.first), call.axes(call.operand(1))
    for axis in (*image[2:], *boxes):
        call.lock(axis, "a spatial dimension")
    call.lock(image[0], BY_NUMBER)  # every box names its image
    return [(boxes[0], image[1], *(call.fresh(n, "a spatial dimension") for n in t.shape[2:])) for t in call.results]


@register("torchvision::nms")
def suppression(call: Call) -> Axes:
    """Numbers of the boxes that stay."""
    for tensor in call.tensors():
        for axis in call.axes(tensor):
            call.lock(axis, BY_NUMBER)
    return (call.fresh(call.results[0].shape[0], BY_NUMBER),)
