# SPDX-License-Identifier: Apache-2.0
"""nlx: models and optimizers as nested levels of memory, each on its own clock."""

from nlx import inspect as inspect
from nlx import learned as learned
from nlx import memories as memories
from nlx import nn as nn
from nlx import objectives as objectives
from nlx import ops as ops
from nlx import optim as optim
from nlx import testing as testing
from nlx import train as train
from nlx import writes as writes
from nlx.clock import Clock as Clock
from nlx.level import Association as Association
from nlx.level import Level as Level
from nlx.level import LevelState as LevelState
from nlx.level import associative_memory as associative_memory
from nlx.nest import Nest as Nest
from nlx.nest import as_level as as_level
from nlx.writes import Write as Write
