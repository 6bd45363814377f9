# SPDX-License-Identifier: Apache-2.0
"""The built-in sample textures as an anomalib datamodule."""

from .sample_textures import SampleTextures

__all__ = ["SampleTextures"]
