"""What a tensor was made of: the model's own tensors at the far end of the calls that lead to it."""

from __future__ import annotations

from collections import defaultdict

from secateur.structure.trace import Step, Trace, numbers_in


def made_of(trace: Trace, number: int) -> list[int]:
    """Numbers of the parameters and buffers that a tensor was computed from, itself included where it is one.

    Args:
        trace: as far as the run has come.
        number: of the tensor.

    Cost: one walk over the steps so far.
    """
    makers: dict[int, list[Step]] = defaultdict(list)
    for step in trace.steps:
        for output in step.outputs:
            makers[output].append(step)
    seen, todo = {number}, [number]
    while todo:
        for step in makers[todo.pop()]:
            new = {*numbers_in(step.args), *numbers_in(step.kwargs)} - seen
            seen |= new
            todo += new
    return sorted(seen & trace.names.keys())
