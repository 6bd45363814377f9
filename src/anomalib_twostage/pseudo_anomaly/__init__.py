# SPDX-License-Identifier: Apache-2.0
"""Pseudo-anomalies: the two painters, and what they paint with."""

from .faults import imitate_faults
from .illumination import vary_illumination
from .painters import PerlinAnomaly, PseudoAnomaly, PseudoAnomalyTransform, SuperpixelAnomaly
from .perlin import perlin_noise, random_perlin_noise

__all__ = [
    "PerlinAnomaly",
    "PseudoAnomaly",
    "PseudoAnomalyTransform",
    "SuperpixelAnomaly",
    "imitate_faults",
    "perlin_noise",
    "random_perlin_noise",
    "vary_illumination",
]
