"""A comparison as the command line asks for it: words in, base models trained where they have none, files out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import nn

from secateur import criteria as known
from secateur.comparison.compare import Comparison, compare
from secateur.comparison.contestants import CriterionChoice
from secateur.comparison.hashes import key_of
from secateur.comparison.levels import middle_of
from secateur.comparison.recoveries import CheckedSteps, Steps
from secateur.errors import InputError, RecipeError, UnsupportedError
from secateur.files.safe import load_tensors, save_tensors
from secateur.measure import yardstick
from secateur.model.door import Parts
from secateur.recipe import load_recipe
from secateur.recipe.overrides import choice_of
from secateur.sources import Source, TensorData, on_device, resolve_metric, resolve_model, train_demo
from secateur.types import Batch, Data, Progress
from secateur.words import CRITERIA, translated

EVERYTHING = "all"
DEFAULT_CRITERIA = ("magnitude", "fpgm", "taylor")
QUICK_STEPS: Steps = ({"method": "bn_refresh", "batches": 2}, {"method": "finetune", "steps": 6})


@dataclass(frozen=True)
class Study:
    """What a command line may say about a comparison.

    Args:
        model, data: MODEL and DATA words.
        criteria: names, or name:option=value; "all" stands for every criterion that is known.
        levels: fractions removed; None = six by default.
        granularity, match, scope: as in `compare`.
        seeds: how many.
        recover: recovery steps.
        recover_levels: where they are run; None = everywhere.
        epochs: passes over the data with which base models without weights are trained, one per seed; None =
            `usual_epochs`. Refused for a model with weights.
        limits: batches of train, calibration and test that are used; None = all.
        rounds: timed rounds of the latency.
        probes: units whose removal alone is measured; 0 = none.
        protect: names or patterns that stay whole.
        device: where the models run; None = where they are.
        metric: METRIC words, of which the first is compared; none = by the labels.
        usual_epochs: where none are asked for.
        usual_probes: likewise.
    """

    model: str
    data: str
    criteria: tuple[str, ...] = DEFAULT_CRITERIA
    levels: tuple[float, ...] | None = None
    granularity: str = "channel"
    match: str = "auto"
    scope: str = "global"
    seeds: int = 3
    recover: Steps = ()
    recover_levels: tuple[float, ...] | None = None
    epochs: int | None = None
    limits: tuple[int | None, int | None, int | None] = (None, None, None)
    rounds: int = 30
    probes: int | None = None
    protect: tuple[str, ...] = ()
    device: str | None = None
    metric: tuple[str, ...] = ()
    usual_epochs: int = 3
    usual_probes: int = 64


def preset(study: Study, name: str) -> Study:
    """Make a study small: "quick" keeps strengths, seeds and controls, and uses a few batches of everything.

    Good for seeing that all works, and in which direction things go; too coarse to choose by.

    Raises:
        RecipeError: an unknown preset.
    """
    if name != "quick":
        raise RecipeError(f"there is no preset {name!r}", hint="known: quick")
    # Recovery is the dear part: one level, the lower of the two in the middle, shows what it does.
    middle = None if study.levels is None else (middle_of(sorted(study.levels)),)
    return replace(
        study,
        recover=study.recover or QUICK_STEPS,
        recover_levels=study.recover_levels or middle or (0.5,),
        usual_epochs=2,
        limits=(20, 2, 4),
        rounds=3,
        usual_probes=32,
    )


def run_study(study: Study, out: Path, *, command: str = "", progress: Progress | None = None) -> Comparison:
    """Resolve the words, train base models where needed, and compare.

    Args:
        study: what is asked for.
        out: folder of the results; base models that were trained lie in ``out/base``.
        command: the line that repeats it.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        InputError: the data have no labels to measure accuracy with, or the model is random and cannot be trained.
    """
    choices = [parse_criterion(word) for word in named_criteria(study.criteria)]
    source = on_device(resolve_model(study.model), study.device)
    if source.trained and study.epochs is not None:
        raise RecipeError(
            f"--epochs trains a network that has no weights, and {study.model} has its own.", hint="Leave it out."
        )
    found = source.read(study.data)
    if found.test is None:
        raise InputError(
            f"{study.data} has no test part, so there is no quality to compare",
            hint="give one (a py: factory returns train, calibration and test), "
            "or call secateur.comparison.compare() with your own evaluate(model)",
        )
    train, calibration, test = (
        data if limit is None else sample(data, limit)
        for data, limit in zip((found.train, found.calibration, found.test), study.limits, strict=True)
    )
    judged = yardstick(source.model, Parts(test=test), resolve_metric(study.metric))
    if judged.evaluate is None:
        raise InputError(
            f"{study.data} has no labelled test part, so there is no quality to compare",
            why=judged.why,
            hint="call secateur.comparison.compare() with your own evaluate(model)",
        )
    return compare(
        source.model if source.trained else _trainer(study, source, train, out, progress),
        train,
        criteria=choices,
        evaluate=judged.evaluate,
        out=out,
        granularity=study.granularity,
        levels=study.levels,
        match=study.match,
        seeds=study.seeds,
        calibration=calibration,
        example=found.example,
        recover=study.recover or None,
        recover_levels=study.recover_levels if study.recover else None,
        scope=study.scope,
        rounds=study.rounds,
        probes=study.usual_probes if study.probes is None else study.probes,
        protect=study.protect,
        # What was measured otherwise is another result, and is not taken from the folder of an earlier comparison.
        tag=f"{study.model} {study.data} test={study.limits[2]}" + "".join(f" {word}" for word in study.metric),
        title=f"{study.model} on {study.data}",
        command=command,
        progress=progress,
    )


def named_criteria(words: Sequence[str]) -> list[str]:
    """The words, with "all" replaced by every known criterion."""
    # The control takes part unasked; as one of "all" it would stand among the criteria.
    everything = [name for name in known.names() if name != "random"]
    return [name for word in words for name in (everything if word == EVERYTHING else [word])]


def parse_criterion(word: str) -> CriterionChoice:
    """``name`` or ``name:option=value:option=value``.

    Raises:
        RecipeError: malformed, or no such criterion or option.

    Example:
        >>> parse_criterion("magnitude:norm=l1")
        {'name': 'magnitude', 'norm': 'l1'}
    """
    found = choice_of(word)
    options = {key: value for key, value in found.items() if key != "name"} if isinstance(found, dict) else {}
    # Looked up here, so that a slip of the pen is refused before data are read and networks trained.
    known.get(found["name"] if isinstance(found, dict) else found, options)
    return cast(CriterionChoice, translated(found, CRITERIA))


def recovery_of(recipe: str) -> CheckedSteps:
    """The recovery steps of a recipe, by name or file."""
    found = load_recipe(recipe)
    if found.training is not None:
        raise RecipeError(
            "A comparison prunes models as they came, and this recipe trains them before or meanwhile.",
            hint="Leave training out of it.",
        )
    if not found.recover:
        raise RecipeError(f"{recipe} has no recovery steps.", hint="Leave --recover out, or name another recipe.")
    return tuple(step.model_dump(mode="json", exclude_none=True) for step in found.recover)


def sample(data: Data, batches: int) -> Data:
    """Some batches of the data: random samples where they lie in memory, else the first batches.

    Test sets are often sorted by class, so their first batches are no sample.
    """
    if not isinstance(data, TensorData):
        return Limited(data, batches)
    # Always the same sample, whatever the seed: seeds are to differ in training, and not in what they are judged by.
    order = torch.randperm(data.num_samples, generator=torch.Generator().manual_seed(0))
    chosen = order[: batches * data.batch_size].sort().values
    return TensorData(
        data.inputs[chosen],
        data.targets[chosen],
        batch_size=data.batch_size,
        shuffle=data.shuffle,
        seed=data.seed,
        normalize=data.normalize,
    )


class Limited:
    """The first batches of some data; `set_epoch` is passed on, so that shuffled data give others each epoch.

    Args:
        data: batches.
        batches: how many.
    """

    def __init__(self, data: Data, batches: int) -> None:
        self._data, self._batches = data, batches

    @property
    def epoch(self) -> int:
        """The epoch that is set."""
        return int(getattr(self._data, "epoch", 0))

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on."""
        setter = getattr(self._data, "set_epoch", None)
        if callable(setter):
            setter(epoch)

    def __len__(self) -> int:
        return min(self._batches, len(self._data))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self._data), self._batches)


def _trainer(
    study: Study, source: Source, train: Data, out: Path, progress: Progress | None
) -> Callable[[int], nn.Module]:
    """``seed -> trained model``; what was trained is kept in the folder."""
    if not source.name.startswith("demo:"):
        raise UnsupportedError(
            f"{source.name} has random weights, and only demo networks are trained here",
            hint="train it first, and give it as py:package.module:factory",
        )
    epochs = study.epochs or study.usual_epochs
    folder = out / "base"  # beside the cells: they belong to these very weights

    def step(done: int, total: int) -> None:
        if progress is not None:
            progress("train base models", done, total)

    def build(seed: int) -> nn.Module:
        key = key_of(model=source.name, data=study.data, epochs=epochs, limit=study.limits[0], seed=seed)
        path = folder / f"seed-{seed}-{key[:12]}.safetensors"
        # Pooling and small convolutions on a CPU are twice as fast with the channels last. Copies and cuts of the
        # network keep the format, so every run of a comparison gains alike.
        model = on_device(resolve_model(source.name, seed=seed), study.device).model
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if path.exists():
            model.load_state_dict(load_tensors(path))
            return model
        train_demo(model, train, epochs, progress=step, seed=seed)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {name: tensor.detach() for name, tensor in model.state_dict().items()})
        return model

    return build
