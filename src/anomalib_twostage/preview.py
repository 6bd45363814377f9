# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m anomalib_twostage.preview``; see :mod:`anomalib_twostage.inspection.preview`."""

from .inspection.preview import main

if __name__ == "__main__":
    main()
