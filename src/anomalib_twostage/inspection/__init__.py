# SPDX-License-Identifier: Apache-2.0
"""What people look at: pictures of the stages, regions, the paint, thresholds."""
