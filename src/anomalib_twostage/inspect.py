# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m anomalib_twostage.inspect``; see :mod:`anomalib_twostage.inspection.page.command`."""

from .inspection.page.command import main

if __name__ == "__main__":
    main()
