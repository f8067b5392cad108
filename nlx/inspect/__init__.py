# SPDX-License-Identifier: Apache-2.0
"""The white box: levels as a table and as wiring, and what memories do while a text is read."""

from nlx.inspect.flops import flops as flops
from nlx.inspect.mixers import Link as Link
from nlx.inspect.reading import Watched as Watched
from nlx.inspect.reading import watch as watch
from nlx.inspect.rows import Row as Row
from nlx.inspect.rows import Size as Size
from nlx.inspect.rows import levels as levels
from nlx.inspect.rows import size as size
from nlx.inspect.rows import table as table
from nlx.inspect.traces import Range as Range
from nlx.inspect.traces import Trace as Trace
from nlx.inspect.traces import follow as follow
from nlx.inspect.traces import memory_age as memory_age
from nlx.inspect.traces import surprise as surprise
from nlx.inspect.traces import transition_range as transition_range
from nlx.inspect.wiring import Stored as Stored
from nlx.inspect.wiring import links as links
from nlx.inspect.wiring import stored as stored
from nlx.inspect.wiring import wiring as wiring
