# SPDX-License-Identifier: Apache-2.0
"""The white box: levels as a table and as wiring, and what memories do while a text is read."""

from nlx.inspect.memory import Range as Range
from nlx.inspect.memory import Trace as Trace
from nlx.inspect.memory import follow as follow
from nlx.inspect.memory import memory_age as memory_age
from nlx.inspect.memory import surprise as surprise
from nlx.inspect.memory import transition_range as transition_range
from nlx.inspect.table import Row as Row
from nlx.inspect.table import Size as Size
from nlx.inspect.table import levels as levels
from nlx.inspect.table import size as size
from nlx.inspect.table import table as table
from nlx.inspect.watch import Watched as Watched
from nlx.inspect.watch import watch as watch
