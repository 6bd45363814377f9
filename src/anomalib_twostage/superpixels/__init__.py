# SPDX-License-Identifier: Apache-2.0
"""SLIC superpixels in tensor operations, and what is done with them."""
