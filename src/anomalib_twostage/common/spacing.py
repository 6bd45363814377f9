# SPDX-License-Identifier: Apache-2.0
"""Some of many, evenly spaced."""

__all__ = ["evenly_spaced"]


def evenly_spaced(length: int, most: int) -> list[int]:
    """Choose evenly spaced places in a sequence.

    Args:
        length: Length of the sequence.
        most: How many places at most.

    Returns:
        Rising indices below ``length``, the first of them 0; all, if there are no more than ``most``.

    Example:
        >>> evenly_spaced(10, 4)
        [0, 2, 5, 7]
    """
    count = min(length, most)
    return [i * length // count for i in range(count)]
