"""Plans and cuts a model as a user would, then compares the cut model with an independent truth on all its inputs."""

from __future__ import annotations

import copy
import dataclasses
import linecache
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import ForwardError, SecateurError, TargetError

from .cases import Case, Make, enliven
from .references import Kept, copied, plain, put, zeroed

RIGHT, LOCKED, REFUSED, TOLD = "right", "locked", "refused", "told"
WRONG, INTERNAL, CRASH = "SILENT WRONG", "internal error", "crash later"
BROKEN = "broken truth"  # the case itself is wrong: its truth does not run
GOOD = (RIGHT, LOCKED, REFUSED, TOLD)
ORDER = (BROKEN, WRONG, INTERNAL, CRASH, TOLD, RIGHT, LOCKED, REFUSED)
CLOSE = 3e-4


@dataclass(frozen=True)
class Verdict:
    """How one try, or all tries of a case, ended."""

    outcome: str
    why: str = ""
    kind: str = ""
    cut: tuple[str, ...] = ()


class _Differs(Exception):
    """The cut model is not the truth."""


def judge(case: Case) -> tuple[Verdict, list[Verdict]]:
    """The worst of all tries, and every try."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the models; what is judged are outcomes
        tries = [attempt(case, kind, target, seed) for kind, seed, target in _plans(case)]
    return min(tries, key=lambda verdict: ORDER.index(verdict.outcome)), tries


def _plans(case: Case) -> Iterator[tuple[str, int, float]]:
    """All targets for the first granularity, the first target for the others."""
    for number, kind in enumerate(case.kinds):
        for seed, target in enumerate(case.targets[: 1 if number else None]):
            yield kind, seed, target


def needless(case: Case, tries: list[Verdict]) -> list[Verdict]:
    """One refusal for each granularity that could have been cut and never was."""
    found = []
    for kind in case.right:
        here = [verdict for verdict in tries if verdict.kind == kind]
        cut = {name for verdict in here for name in verdict.cut}
        left = [name for name in case.must if name not in cut]
        if not cut or left:
            why = here[0].why or f"cut without {', '.join(left)}"
            found.append(dataclasses.replace(here[0], why=why))
    return found


def attempt(case: Case, kind: str, target: float, seed: int) -> Verdict:
    """One plan, one cut, all comparisons."""
    model, example = build(case), case.inputs[0]()
    before, given = snapshot(model), copy.deepcopy(example)
    options: dict[str, Any] = {"scope": "global" if kind in ("layer", "expert") else "local"}
    if kind != "layer":
        options["criterion"] = {"name": "random"}
    try:
        plan = sc.plan(model, example, granularity=kind, target={"sparsity": target}, seed=seed, **options)
        cut = plan.apply(model)
    except SecateurError as error:
        text = " ".join(str(error).split())
        blamed = isinstance(error, ForwardError) and _takes(build(case), case.inputs[0](), training=False)
        if blamed or re.search(r"please report", text, re.IGNORECASE):
            return Verdict(INTERNAL, text, kind)
        locked = isinstance(error, TargetError) or "can be cut at granularity" in text
        return Verdict(LOCKED if locked else REFUSED, text, kind)
    except Exception as error:
        return Verdict(INTERNAL, f"{type(error).__name__}: {error}", kind)
    changed = snapshot(model) != before or not same(example, given)
    if changed:
        return Verdict(WRONG, "the user's model or example was changed", kind)
    if not plan.cuts and not plan.layers:
        return Verdict(LOCKED, "the plan removes nothing", kind)
    return dataclasses.replace(
        compare(case, kind, model, plan, cut), kind=kind, cut=tuple(plan.cuts) or tuple(plan.layers)
    )


def build(case: Case) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return enliven(case.build()).eval()


def compare(case: Case, kind: str, model: nn.Module, plan: Any, cut: nn.Module) -> Verdict:
    """The cut model against the truths of the case: one of them has to hold everywhere."""
    kept = Kept(model, plan)
    for name in case.whole if kind != "expert" else ():
        tensor, _, dim = name.partition(":")
        if kept.cut(tensor, int(dim or 0)):
            return Verdict(WRONG, f"{tensor} holds data in dimension {dim}, and lost a part")
    verdicts = [_against(case, model, kept, cut, truth) for truth in case.truths or (plain,)]
    best = max(verdicts, key=lambda verdict: ORDER.index(verdict.outcome) if verdict.outcome != RIGHT else 99)
    if best.outcome in (WRONG, CRASH) and "[example]" not in best.why and told(case, plan):
        return Verdict(TOLD, best.why)
    if best.outcome == WRONG and case.chance and told(case, plan, "drawn at random"):
        quiet = dataclasses.replace(case, still=(case.chance,), chance="", condition="")
        held = compare(quiet, kind, model, plan, cut)
        return Verdict(TOLD, best.why) if held.outcome == RIGHT else held
    return best


def _truth(case: Case, model: nn.Module, kept: Kept, truth: Any) -> nn.Module:
    original = zeroed(model, kept)
    truth(original, kept)
    return _still(case, original)


def _still(case: Case, model: nn.Module) -> nn.Module:
    for name in case.still:
        owner, _, last = name.rpartition(".")
        put(model.get_submodule(owner) if owner else model, last, torch.zeros_like)
    return model


def _against(case: Case, model: nn.Module, kept: Kept, cut: nn.Module, truth: Any) -> Verdict:
    for number, make in enumerate(case.inputs):
        for training in (False, True) if case.train and number < 2 else (False,):
            verdict = _on_input(case, model, kept, cut, truth, make, training)
            if verdict is not None:
                where = f"[{'example' if not number else f'input {number}'}{', train mode' if training else ''}]"
                return Verdict(verdict.outcome, f"{where} {verdict.why}")
    return Verdict(RIGHT)


def _on_input(
    case: Case, model: nn.Module, kept: Kept, cut: nn.Module, truth: Any, make: Make, training: bool
) -> Verdict | None:
    def true(seed: int = 0) -> tuple[list[Any], set[str]]:
        return run(_truth(case, model, kept, truth), make(), training, seed, fast=False)

    try:
        want, goals = true()
    except Exception as error:
        return Verdict(BROKEN, repr(error)) if _takes(model, make(), training) else None
    try:
        have, reached = run(_still(case, copied(cut)), make(), training)
    except Exception as error:
        return Verdict(CRASH, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    wrong = _difference(want, have)
    reached = {kept.name_before(name) for name in reached}
    if not wrong and goals != reached:
        wrong = f"gradients reach other parameters: {sorted(goals ^ reached)}"
    if wrong and training and _difference(want, true(seed=1)[0]):
        return None  # random in this mode: it runs, and that is what can be asked
    return Verdict(WRONG, wrong) if wrong else None


def _takes(model: nn.Module, example: Any, training: bool) -> bool:
    """Whether the original takes an input; where it does not, it promises nothing."""
    try:
        run(copied(model), example, training)
    except Exception:
        return False
    return True


def run(
    model: nn.Module, example: Any, training: bool, seed: int = 0, *, fast: bool = True
) -> tuple[list[Any], set[str]]:
    """Outputs of two calls, one after the other, and the parameters that gradients reach.

    Truths run without torch's fused encoder layers, which read the weights of norms past their modules.
    """
    model.train(training)
    torch.backends.mha.set_fastpath_enabled(fast)
    arguments = example if isinstance(example, tuple) else (example,)
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(training):
        torch.manual_seed(seed)
        found: list[Any] = []
        for _ in range(2):
            given = copy.deepcopy(arguments)
            found += flat(model(**given[0]) if isinstance(given[0], Mapping) else model(*given))
    if training:
        live = [o for o in found if isinstance(o, Tensor) and o.requires_grad]
        if live:
            sum((o.double() * torch.arange(1, o.numel() + 1).view(o.shape)).sum() for o in live).backward()
    named = model.named_parameters()
    reached = {n.replace("inner_of_kept.", "") for n, p in named if p.grad is not None}
    return [o.detach() if isinstance(o, Tensor) else o for o in found], reached


def flat(output: Any) -> Iterator[Any]:
    """Tensors, numbers and words of any structure, in order."""
    if isinstance(output, Mapping):
        for key in output:
            yield str(key)
            yield from flat(output[key])
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from flat(part)
    elif dataclasses.is_dataclass(output):
        yield from flat(vars(output))
    else:
        yield output.to_dense() if isinstance(output, Tensor) and output.layout != torch.strided else output


def differ(want: list[Any], have: list[Any]) -> None:
    """Raises where two outputs are not the same up to rounding."""
    if len(want) != len(have):
        raise _Differs(f"{len(have)} outputs instead of {len(want)}")
    for a, b in zip(want, have, strict=True):
        _one(
            torch.as_tensor(a) if isinstance(a, (float, int)) else a,
            torch.as_tensor(b) if isinstance(b, (float, int)) else b,
        )


def _one(a: Any, b: Any) -> None:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        if isinstance(a, Tensor) or isinstance(b, Tensor) or str(a) != str(b):
            raise _Differs(f"output {str(b)[:80]!r} instead of {str(a)[:80]!r}")
        return
    if a.shape != b.shape:
        raise _Differs(f"shape {tuple(b.shape)} instead of {tuple(a.shape)}")
    a, b = (
        a.to(torch.complex128 if a.is_complex() else torch.float64),
        b.to(torch.complex128 if b.is_complex() else torch.float64),
    )
    if not torch.equal(a.isfinite(), b.isfinite()):
        raise _Differs("other values are not finite")
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    if a.numel() and float((a - b).abs().max()) > CLOSE * max(float(a.abs().max()), 1e-6):
        raise _Differs(f"relative error {float((a - b).abs().max()) / max(float(a.abs().max()), 1e-6):.2g}")


def _difference(want: list[Any], have: list[Any]) -> str:
    """What differs, in words; empty where nothing does."""
    try:
        differ(want, have)
    except _Differs as error:
        return str(error)
    return ""


def told(case: Case, plan: Any, words: str = "") -> bool:
    """Whether the plan's words name the line, in the model's own code, on which another path was open.

    Args:
        words: what the sentence has to say too.
    """
    if not case.condition:
        return False
    file = Path(__file__).with_name(f"family_{case.family}.py")
    said = "\n".join(line for line in plan.explain().splitlines() if words in line)
    for name, line in re.findall(r"([\w./-]+\.py):(\d+)", said):
        if Path(name).name == file.name and case.condition in linecache.getline(str(file), int(line)):
            return True
    return False


def snapshot(model: nn.Module) -> list[Any]:
    """Every tensor's bits and every plain attribute, also inside containers."""
    found: list[Any] = []
    for path, module in model.named_modules():
        for name, value in sorted(vars(module).items()):
            if name not in ("_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                found.append((path, name, _plain(value)))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (
            tuple(value.shape),
            str(value.dtype),
            value.detach().to_dense().flatten().tolist() if not value.is_meta else None,
            value.requires_grad,
        )
    if isinstance(value, Mapping):
        return [(str(k), _plain(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__


def same(a: Any, b: Any) -> bool:
    return repr(_plain(a)) == repr(_plain(b))
