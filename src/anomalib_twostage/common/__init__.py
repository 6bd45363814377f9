# SPDX-License-Identifier: Apache-2.0
"""What several rooms need and that is nobody's subject."""
