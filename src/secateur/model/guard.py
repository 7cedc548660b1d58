"""The one way to give a model, the random generators and the example back as they were.

Everything that runs a user's model runs inside `guard`. What a forward, a criterion or a proof leaves behind (a
training flag, a hook, a counter in a buffer, a cache in an attribute, a number drawn from a generator) is then undone,
also where an exception passes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import numpy as np
import torch
from torch import nn

from secateur.model.modules import modules_of
from secateur.model.state import State
from secateur.types import Example

Mode = Literal["eval", "train"]


@contextmanager
def guard(
    *models: nn.Module,
    mode: Mode | None = None,
    gradients: bool | None = None,
    seed: int | None = None,
    example: Example = None,
    copies: bool = True,
    chance: bool = True,
    rollback: bool = False,
    state: State | None = None,
) -> Iterator[State]:
    """Run a block, and give back what it was lent, bit for bit, also when an exception passes through.

    Put back are, of every module: training flags, hooks, parameters and buffers by identity (those that were replaced,
    registered anew or deleted), the values of buffers, and attributes, with the lists, mappings, sets, arrays, objects,
    generators and tensors in them; what closures and defaults of hooks and methods hold, attributes of the model's own
    classes, and variables of modules that its methods use; of every tensor: requires_grad, hooks and the gradient,
    which is put aside meanwhile so that no backward pass adds to it; the grad mode, the default dtype and the number of
    threads; the generators of Python, NumPy, torch and CUDA; and the example, its containers and tensors.

    Iterators of Python have twins in their places meanwhile, and streams are set back; with `rollback` they move on.

    Not put back: the values of weights that the block writes to (see `rollback`, and `secateur.model.written`), what
    was written to files, what objects of Python, torch and NumPy hold beside the kinds above, and what
    the first forward makes of lazy modules.

    Args:
        models: what is lent; modules that they share count once.
        mode: "eval" sets every flag itself, so that a model that overrides ``train()`` cannot keep some of its layers
            in training; "train" calls ``train()``, so that such a model can keep its norms frozen; None = as it is.
        gradients: grad mode inside; None = as it is.
        seed: seeds all generators on entry; None = they go on from where they are.
        example: what the block runs the models on.
        copies: False = the values of buffers, attributes and example are not kept, for callers that undo writes
            themselves or stand inside another guard. All else comes back.
        chance: False = the generators stay as the block leaves them, for callers that stand inside another guard.
        rollback: for training: weights, buffers and attributes stay as the block leaves them, unless an exception
            passes; then the weights come back too.
        state: what a guard of the same models and example has kept before, for many runs in a row; it is what they are
            put back to, and they are not looked at anew.

    Raises:
        UnsupportedError: the models or the example hold an iterator that can be neither copied nor moved back.

    Yields:
        what is kept, which can say whether anything has changed.

    Cost:
        A copy of the buffers and the example and, with `rollback`, of the weights; one comparison of each copy at the
        end. Without copies some 30 microseconds per module and class, whatever the size of the model.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> with guard(layer, mode="eval"):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    if state is None:
        state = State(models, example, copies=copies or rollback, weights=rollback)
    if not chance and seed is not None:
        _seed(seed)
    with generators(seed) if chance else nullcontext(), _switches(gradients):
        failed = True
        try:
            state.put_aside(iterators=not rollback)
            enter(models, mode)
            yield state
            failed = False
        finally:
            state.put_back(everything=failed or not rollback)


def evaluating(*models: nn.Module, example: Example = None) -> AbstractContextManager[object]:
    """A `guard` in eval mode without gradients."""
    return guard(*models, mode="eval", gradients=False, example=example)


@contextmanager
def generators(seed: int | None = None) -> Iterator[None]:
    """The random generators of Python, NumPy and torch (CPU and all CUDA devices), put back at the end.

    Args:
        seed: seeds all of them on entry; None = they go on from where they are.
    """
    started = _cuda_started()
    cuda = torch.cuda.get_rng_state_all() if started else []
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    initial = torch.initial_seed()
    try:
        if seed is not None:
            _seed(seed)
        yield
    finally:
        if started:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_available() and (seed is not None or _cuda_started()):
            # CUDA that was not started has no state yet, and asking for it would have started it: it gets the seed
            # with which it would have started.
            torch.cuda.manual_seed_all(initial)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - data of the user may draw from the global generator
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        # The function keeps the whole call stack for every kind of device that might be started later, each time.
        torch.default_generator.manual_seed(seed)


def _cuda_started() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def _switches(gradients: bool | None) -> Iterator[None]:
    """Switches of the process that a forward may turn: the grad mode, which is set, the default dtype, the threads."""
    before, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    try:
        if gradients is not None:
            torch.set_grad_enabled(gradients)
        yield
    finally:
        torch.set_grad_enabled(before)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def enter(models: Iterable[nn.Module], mode: Mode | None) -> None:
    """Set the training flags, as `guard` says."""
    for model in models:
        if mode == "train":
            model.train()
        elif mode == "eval":
            for module in modules_of(model):
                if module.training:
                    module.training = False
