"""A plan in words: what it removes, and how it differs from another."""

from __future__ import annotations

from secateur.errors import visible
from secateur.kinds.layers.drop import stub_names
from secateur.planning.decision import PlanData
from secateur.structure.grouped import grouped
from secateur.types import Certificate


def explain(plan: PlanData) -> str:
    """The plan in words: totals, then one line per group."""
    units = plan.units
    lines = [
        f"{plan.model}: removes {units['removed']} of {units['total']} {units['what']} units "
        f"({units['sparsity']:.1%}) by {plan.request.criterion.name}"
    ]
    for key, (before, after) in plan.cost.items():
        what = "macs per sample" if key == "macs" else key
        lines.append(f"{what}: {before:,} -> {after:,} ({after / max(before, 1):.1%})")
    width = max((len(name) for name in plan.groups), default=0)
    for name, group in plan.groups.items():
        gone = len(group["removed"])
        lines.append(f"  {name:<{width}}  {group['granularity']:<10} {group['size'] - gone}/{group['size']} kept")
    lines += _branches(plan)
    for name, mask in plan.masks.items():
        lines.append(f"  {name}: {int(mask.sum())}/{mask.numel()} weights kept")
    lines += [f"  {note}" for note in plan.notes]
    for one in plan.left_out:
        lines.append(f"  {one.name}: {one.params:,} weights left out: {one.why}" + (f"; {one.hint}" * bool(one.hint)))
    for scale in plan.scales:
        part = f"{scale.start}:{scale.stop} of dimension {scale.dim}"
        lines.append(f"  {scale.tensor}: {part} times {scale.factor:.4g}, so that a scale by a width stays what it was")
    if plan.certificate:
        lines.append(f"certificate: {_figures(plan.certificate)}")
        lines += [f"  {line}" for line in evidence(plan.certificate)]
    elif plan.removes:
        lines.append(not_proved(plan.recorded))
    if plan.conditions:
        lines += ["conditions:", *(f"  {line}" for line in grouped(plan.conditions))]
    # Names in a plan may come from a file, and a line feed in one of them would look like a line of its own.
    return "\n".join(visible(line) for line in lines)


def _branches(plan: PlanData) -> list[str]:
    """What something without weights stands for now, a few names at a time."""
    names = stub_names(plan.layers)
    return [f"  zeros in the place of: {', '.join(names[i : i + 4])}" for i in range(0, len(names), 4)]


def not_proved(recorded: Certificate | None) -> str:
    """What is said of a plan whose cut nobody has proved in this process.

    Args:
        recorded: what its file says of a proof; None where it says nothing, or there is no file.
    """
    says = "there is no record of a proof" if recorded is None else f"the file's record says: {_figures(recorded)}"
    return visible(f"not proved here; {says}")


def evidence(proof: Certificate) -> list[str]:
    """What a certificate stands on, beside the first proof on the example, and what it leaves open: one line each."""
    lines = [f"held on {t.input}: error {t.error:.1e} ({t.method})" for t in proof.trials]
    return [*(lines or ["not tried on any other input, nor by a second method"]), *proof.notes]


def _figures(proof: Certificate) -> str:
    return f"error {proof.max_abs_error:.1e} in {proof.dtype} ({proof.method}; proof: {proof.effort})"


def diff(plan: PlanData, other: PlanData) -> str:
    """What `other` decides differently, one line per group or tensor; empty where they agree."""
    lines = []
    for name in sorted({*plan.groups, *other.groups}):
        mine, theirs = (set(p.groups[name]["removed"]) if name in p.groups else set() for p in (plan, other))
        if mine != theirs:
            lines.append(f"{name}: only here {sorted(mine - theirs)}, only there {sorted(theirs - mine)}")
    for name in sorted({*plan.masks, *other.masks}):
        a, b = plan.masks.get(name), other.masks.get(name)
        if a is None or b is None:
            lines.append(f"{name}: masked in one plan only")
        elif a.shape != b.shape or bool((a != b).any()):
            count = int((a != b).sum()) if a.shape == b.shape else a.numel()
            lines.append(f"{name}: {count} of {a.numel()} mask entries differ")
    return "\n".join(visible(line) for line in lines)
