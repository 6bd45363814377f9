# SPDX-License-Identifier: Apache-2.0
"""The two-stage model, in the rooms of anomalib's own model folders."""
