"""What a refit sees of a batch: one run of each model, looked at where a layer reads and returns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedError
from secateur.model.padding import without_padding
from secateur.solve.refit_layers import RefitLayer, RefitRule, RefitSums, layers_of, uses_of
from secateur.statistics.activations.gram import Sampler
from secateur.statistics.activations.observe import Flow, Observer, Site
from secateur.structure.capture import capture
from secateur.structure.trace import Op, Trace
from secateur.types import Example


@dataclass(frozen=True, eq=False)
class RefitBatch:
    """A batch as both models take it.

    Args:
        original: for the original.
        cut: for the cut model.
        real: which of its tokens are no padding, bool [batch, tokens]; None: all, or nothing says.
    """

    original: Example
    cut: Example
    real: Tensor | None = None


FORMS = 8  # ways in which batches may differ in the calls that the models make
Layers = dict[str, RefitLayer]


class BatchForms:
    """The calls that the models make for a batch, where batches differ in them: a mask that padding alone needs.

    A batch that fits no trace so far is traced itself, once; which one it fits is kept for the next layer. To fit it
    must make all calls of the layers' operators, with the same weights: a layer that runs once more, and experts of
    which each batch takes others, are another form.

    Args:
        models: the original and the cut model.
        rule: what is fitted.
        traces: of both.
        layers: that are fitted.
    """

    def __init__(
        self,
        models: tuple[nn.Module, nn.Module],
        rule: RefitRule,
        traces: tuple[Trace, Trace],
        layers: Sequence[RefitLayer],
    ) -> None:
        self._models, self._rule, self._names = models, rule, [layer.weight for layer in layers]
        self._known: list[tuple[tuple[Trace, Trace], Layers]] = [(traces, {layer.weight: layer for layer in layers})]
        self._fits: dict[int, int] = {}

    def add(self, place: int, weight: str, sums: RefitSums, sampler: Sampler, batch: RefitBatch) -> None:
        """Add a batch to the sums of a layer; nothing where the batch does not reach the layer.

        Args:
            place: number of the batch.
            weight: of the layer.
            sums: are added to.
            sampler: of places in space.
            batch: the batch.

        Raises:
            UnsupportedError: the models do other things even than on this very batch before, or in too many ways.
        """
        last, failed = self._fits.get(place), UnsupportedError("no trace fits the batch")
        for form in sorted(range(len(self._known)), key=lambda number: number != last):
            drawn = sampler.samples
            try:
                self._take(form, weight, sums, sampler, batch, new=form != last)
            except UnsupportedError as error:
                failed, sampler.samples = error, drawn
                continue
            self._fits[place] = form
            return
        if len(self._known) == FORMS:
            raise failed
        traces = capture(self._models[0], batch.original), capture(self._models[1], batch.cut)
        reached = uses_of(Flow(traces[1]))
        found, _ = layers_of(self._models[1], traces, self._rule, [name for name in self._names if name in reached])
        self._known.append((traces, {layer.weight: layer for layer in found}))
        self._fits[place] = len(self._known) - 1
        self._take(self._fits[place], weight, sums, sampler, batch, new=False)

    def _take(self, form: int, weight: str, sums: RefitSums, sampler: Sampler, batch: RefitBatch, *, new: bool) -> None:
        """Add a batch of a form; if it is not known to be of that form, both models run to their ends, and all is seen.

        Raises:
            UnsupportedError: it is of another form.
        """
        traces, layers = self._known[form]
        calls: set[Op] = set()
        if new:
            # Of all forms: a layer that this one does not reach must not be reached by the batch either.
            for own, known in self._known:
                calls |= {own[0].steps[site.step].func for layer in known.values() for site in layer.original}
        others = [layer for layer in layers.values() if new and layer.weight != weight]
        if weight in layers:
            _add_batch(self._models, traces, layers[weight], others, calls, sums, sampler, batch)
        elif new:
            for cut, example in enumerate((batch.original, batch.cut)):
                sites = [site for layer in others for site in (layer.results if cut else layer.original)]
                Observer(self._models[cut], traces[cut], sites, also=calls).run(example, lambda *_: None)


def _add_batch(
    models: tuple[nn.Module, nn.Module],
    traces: tuple[Trace, Trace],
    layer: RefitLayer,
    others: Sequence[RefitLayer],
    calls: Collection[Op],
    sums: RefitSums,
    sampler: Sampler,
    batch: RefitBatch,
) -> None:
    """Add one batch to the sums of a layer: first the cut model, where the rows are drawn, then the original.

    Rows of padding are left out of what is read and of what is returned alike. With calls both run to their ends, and
    must make these and those of the other layers as in the traces.
    """
    shape = layer.geometry
    rows: dict[int, Tensor] = {}
    where: dict[int, Tensor | None] = {}
    given: dict[int, Tensor] = {}
    aside = {s.cut: i for i, s in enumerate(layer.shortcuts) if s is not None}
    moved: dict[int, Tensor] = {}

    def see_cut(site: Site, value: Tensor) -> None:
        if site not in sites:
            return
        value = value if shape.kernel else without_padding(value, batch.real)
        if site in aside:
            moved[aside[site]] = -shape.targets(value, where[aside[site]])
        elif site in layer.results:
            i = layer.results.index(site)
            given[i] = shape.targets(value, where[i])
        else:
            i = layer.inputs.index(site)
            where[i] = shape.places(value, sampler)
            rows[i] = shape.rows(value, where[i])

    sites = [*layer.inputs, *layer.results, *aside]
    beside = [site for other in others for site in other.results]
    Observer(models[1], traces[1], [*sites, *beside], last=not calls, also=calls).run(batch.cut, see_cut)
    goals: dict[int, Tensor] = {}
    before = {s.original: i for i, s in enumerate(layer.shortcuts) if s is not None}

    def see_original(site: Site, value: Tensor) -> None:
        if site not in sites:
            return
        value = value if shape.kernel else without_padding(value, batch.real)
        i = before[site] if site in before else layer.original.index(site)
        taken = shape.targets(value, where[i])
        taken = taken if layer.outputs is None else taken[:, layer.outputs.to(taken.device)]
        if len(taken) != len(given[i]):
            raise _routed(layer.weight, len(given[i]), len(taken))
        if site in before:
            moved[i] = moved[i] + taken
        else:
            goals[i] = taken

    sites = [*layer.original, *before]
    beside = [site for other in others for site in other.original]
    Observer(models[0], traces[0], [*sites, *beside], last=not calls, also=calls).run(batch.original, see_original)
    for i, shortcut in enumerate(layer.shortcuts):
        goal = goals[i] - given[i]
        goal = goal if shortcut is None else goal + moved[i] * shortcut.factor.to(goal.device)
        one = torch.ones_like(rows[i][..., :1])
        sums.add(torch.cat([rows[i], one], -1) if layer.bias else rows[i], goal)


def _routed(weight: str, after: int, before: int) -> UnsupportedError:
    return UnsupportedError(
        f"{weight!r} reads {after} rows of a batch after the cut and {before} before",
        why="the cut model sends it other rows (routed experts, for example)",
        hint="use finetune",
    )
