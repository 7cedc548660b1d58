"""Which of several results are worth a choice, which of them is recommended, and how large a front is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Values = Mapping[str, float]  # objective -> value


@dataclass(frozen=True)
class Goals:
    """The objectives in their order, the first the quality.

    Args:
        names: of the objectives.
        higher: those of which more is better.
    """

    names: tuple[str, ...]
    higher: frozenset[str]

    def signed(self, values: Values) -> tuple[float, ...]:
        """The values, so turned that less is better."""
        return tuple(-values[name] if name in self.higher else values[name] for name in self.names)


def front(results: Sequence[Values], goals: Goals) -> list[int]:
    """Places of the results that no other one beats: none is as good in everything and better in something.

    Of equal results the first one counts.

    Example:
        >>> goals = Goals(("accuracy", "size"), frozenset({"accuracy"}))
        >>> front([{"accuracy": 0.9, "size": 5}, {"accuracy": 0.8, "size": 6}, {"accuracy": 0.7, "size": 1}], goals)
        [0, 2]
    """
    points = [goals.signed(one) for one in results]
    return [
        place
        for place, own in enumerate(points)
        if not any(_beats(other, own) or (other == own and number < place) for number, other in enumerate(points))
    ]


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def recommended(results: Sequence[Values], goals: Goals) -> tuple[int, str]:
    """The place of the result nearest to the best of everything, and why.

    Every objective is scaled to its range on the front, so that none of them counts more for its unit.

    Raises:
        ValueError: there is no result.
    """
    places = front(results, goals)
    if not places:
        raise ValueError("there is no result")
    points = {place: goals.signed(results[place]) for place in places}
    best = [min(point[axis] for point in points.values()) for axis in range(len(goals.names))]
    worst = [max(point[axis] for point in points.values()) for axis in range(len(goals.names))]

    def distance(place: int) -> float:
        scaled = zip(points[place], best, worst, strict=True)
        return sum(((own - low) / (high - low)) ** 2 for own, low, high in scaled if high > low)

    chosen = min(places, key=lambda place: (distance(place), place))
    if len(places) == 1:
        return chosen, "no other result is better in anything"
    given_up = [
        f"{name} {results[chosen][name]:.4g} (best {abs(low):.4g})" for name, low in zip(goals.names, best, strict=True)
    ]
    return chosen, f"nearest of {len(places)} to the best of everything, each scaled to its range: " + ", ".join(
        given_up
    )


def hypervolume(results: Sequence[Values], goals: Goals, reference: Values) -> float:
    """The volume of what a set of results beats, up to a reference that is worse than all of interest.

    By slices along the last objective: exact, and made for the few dozen points that a front has.

    Source: Zitzler and Thiele, "Multiobjective optimization using evolutionary algorithms", 1998.

    Example:
        >>> goals = Goals(("accuracy", "size"), frozenset({"accuracy"}))
        >>> hypervolume([{"accuracy": 0.5, "size": 1.0}], goals, {"accuracy": 0.0, "size": 3.0})
        1.0
    """
    bound = goals.signed(reference)
    points = map(goals.signed, results)
    return _volume([one for one in points if all(a < b for a, b in zip(one, bound, strict=True))], bound)


def _volume(points: Sequence[tuple[float, ...]], bound: Sequence[float]) -> float:
    if not points:
        return 0.0
    if len(bound) == 1:
        return bound[0] - min(point[0] for point in points)
    total, ordered = 0.0, sorted(points, key=lambda point: point[-1])
    for number, point in enumerate(ordered):
        end = ordered[number + 1][-1] if number + 1 < len(ordered) else bound[-1]
        # Between two heights all points up to here count, and no later one.
        total += (end - point[-1]) * _volume([one[:-1] for one in ordered[: number + 1]], bound[:-1])
    return total
