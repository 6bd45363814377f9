# SPDX-License-Identifier: Apache-2.0
"""The inspection page: which images a model gets wrong, and what happens if the threshold moves.

``records`` reads predictions, ``pictures`` draws them, ``rows`` says what the page knows of them, ``writer`` makes the
folder, ``callback`` and ``command`` are the two ways to it. ``files`` holds what a browser gets.
"""
