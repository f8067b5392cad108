# SPDX-License-Identifier: Apache-2.0
"""Matrices with their singular values drawn towards 1."""

from nlx_kernels.newton_schulz.api import newton_schulz as newton_schulz
