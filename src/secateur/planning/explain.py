"""A plan in words: what it removes, and how it differs from another."""

from __future__ import annotations

from secateur.planning.decision import PlanData


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
    for name, mask in plan.masks.items():
        lines.append(f"  {name}: {int(mask.sum())}/{mask.numel()} weights kept")
    if plan.certificate:
        proof = plan.certificate
        lines.append(f"certificate: error {proof.max_abs_error:.1e} in {proof.dtype} ({proof.method})")
    lines += [f"condition: {condition}" for condition in plan.conditions]
    return "\n".join(lines)


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
    return "\n".join(lines)
