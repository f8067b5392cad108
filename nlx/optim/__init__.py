# SPDX-License-Identifier: Apache-2.0
"""Optimizers as memories: every public function here is, or makes, an optax transformation."""

from nlx.optim.deep_momentum import DeepMomentumState as DeepMomentumState
from nlx.optim.deep_momentum import dmgd as dmgd
from nlx.optim.deep_momentum import scale_by_deep_momentum as scale_by_deep_momentum
from nlx.optim.gradient_memory import debiased as debiased
from nlx.optim.gradient_memory import gradient_memory as gradient_memory
from nlx.optim.level import LevelsState as LevelsState
from nlx.optim.level import as_transformation as as_transformation
from nlx.optim.on_clock import OnClockState as OnClockState
from nlx.optim.on_clock import on_clock as on_clock
