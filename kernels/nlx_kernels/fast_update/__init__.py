# SPDX-License-Identifier: Apache-2.0
"""The write of fast weights that every row has for itself: collect, and descend at a firing."""

from nlx_kernels.fast_update.api import fast_update as fast_update
from nlx_kernels.fast_update.carry import FastCarry as FastCarry
