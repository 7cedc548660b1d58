"""How sure a share is that was counted on so many samples."""

from __future__ import annotations

import math

_Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations


def share_interval(share: float, samples: int) -> tuple[float, float]:
    """The 95 % interval of a share that was counted on some samples (Wilson's, which never leaves [0, 1]).

    It says how far the figure would move on other samples of the same kind. Two models that were judged on the same
    samples can differ more surely than their intervals show, since they err on the same ones.

    Args:
        share: hits / samples.
        samples: at least 1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    Example:
        >>> [round(end, 4) for end in share_interval(0.9, 100)]
        [0.8256, 0.9448]
    """
    square = _Z * _Z
    middle = (share + square / (2 * samples)) / (1 + square / samples)
    half = _Z * math.sqrt(share * (1 - share) / samples + square / (4 * samples * samples)) / (1 + square / samples)
    # The share itself lies within; at 0 and at 1 rounding would leave it out.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
