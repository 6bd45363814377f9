# SPDX-License-Identifier: Apache-2.0
"""INT8 quantisation of exported models: the two networks but their first layers, nothing else.

Left alone, NNCF also quantises what lies between and behind the networks. With 256 values for its distances SLIC breaks
down, and with 256 values for the maps most normal pixels tie. A network's first convolution sees images in [0, 1]
beside deviations in [-3, 3]: one scale for both leaves the image some forty values, and shifts whole maps. All the
computing is in the other convolutions anyway.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

__all__ = ["quantize_networks_only"]

# What a network consists of, and what NNCF must see to quantise its convolutions.
_NETWORK_TYPES = {"Concat", "Constant", "Convolution", "Interpolate", "MaxPool", "Parameter", "Relu", "Result"}
_FIRST_LAYER = 11  # channels that a first convolution sees at most: image, two kinds of deviations, two maps


@contextmanager
def quantize_networks_only(model: Any) -> Iterator[None]:
    """Let NNCF quantise the convolutions alone, but for the first of each network, while the context lasts.

    anomalib calls NNCF without a way to hand over an ignored scope, so its two functions are replaced by themselves
    with one.

    Args:
        model: OpenVINO model that is going to be quantised.
    """
    import nncf

    types = sorted({node.get_type_name() for node in model.get_ops()} - _NETWORK_TYPES)
    convolutions = [node for node in model.get_ops() if node.get_type_name() == "Convolution"]
    first = [node.get_friendly_name() for node in convolutions if node.input_value(1).shape[1] <= _FIRST_LAYER]
    scope = nncf.IgnoredScope(names=first, types=types, validate=False)
    names = ("quantize", "quantize_with_accuracy_control")
    originals = {name: getattr(nncf, name) for name in names}
    try:
        for name, original in originals.items():
            setattr(nncf, name, partial(original, ignored_scope=scope))
        yield
    finally:
        for name, original in originals.items():
            setattr(nncf, name, original)
