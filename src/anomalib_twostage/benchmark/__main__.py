# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m anomalib_twostage.benchmark``."""

import sys

from .pipeline import Comparison


def main() -> None:
    """Run the comparison that the command line describes."""
    comparison = Comparison()
    arguments = comparison.get_parser().parse_args()
    try:
        comparison.run(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
