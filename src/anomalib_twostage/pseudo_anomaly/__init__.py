# SPDX-License-Identifier: Apache-2.0
"""Pseudo-anomalies: the two painters, and what they paint with."""

from .faults import imitate_faults
from .from_data import DataPainter, paints
from .illumination import vary_illumination
from .painters import PAINTERS, PerlinAnomaly, PseudoAnomaly, PseudoAnomalyTransform, SuperpixelAnomaly
from .perlin import perlin_noise, random_perlin_noise
from .training import TrainingImages, training_images

__all__ = [
    "PAINTERS",
    "DataPainter",
    "PerlinAnomaly",
    "PseudoAnomaly",
    "PseudoAnomalyTransform",
    "SuperpixelAnomaly",
    "TrainingImages",
    "imitate_faults",
    "paints",
    "perlin_noise",
    "random_perlin_noise",
    "training_images",
    "vary_illumination",
]
