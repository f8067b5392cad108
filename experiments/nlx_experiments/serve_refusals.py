# SPDX-License-Identifier: Apache-2.0
"""What `nlx serve` answers where it does not do what was asked: a status and one true sentence."""

import traceback

from nlx_experiments.console import say
from nlx_experiments.errors import Refused
from nlx_experiments.serve_fields import Bad
from nlx_experiments.serve_http import Reply, refusal
from nlx_experiments.user_files import Unsettled
from nlx_experiments.user_jobs import Busy, Closing, Late, TooLong
from nlx_experiments.users import Full

SOON = ("retry-after", "1")


class Slow(Exception):
    """What was begun is not done in time, and goes on."""


def refused(error: Exception, path: str, *, users: int, waiting: int, seconds: float) -> Reply:
    """The answer to a request that ended in an error, which the log has where no one foresaw it.

    path: of the request. users, waiting: how many there may be. seconds: a request may take.
    """
    late = f"it was not done within {seconds:g} s"
    match error:
        case Bad():
            status, sentence = error.args
            more = [("www-authenticate", "Bearer")] if status == 401 else []
            return refusal(status, sentence, *more)
        case TooLong():
            left = error.args[0]
            sentence = f"the memory has room for {left} more tokens; forget, or ask for fewer."
            return refusal(413, sentence)
        case Full():
            return refusal(503, f"there are {users:,} users, as many as there may be.")
        case Busy():
            sentence = f"{waiting} requests are waiting, as many as may; try again."
            return refusal(503, sentence, SOON)
        case Late():
            return refusal(503, f"{late}; the memory is as it was before.", SOON)
        case Slow():
            return refusal(503, f"{late}, and may still be done.")
        case Closing():
            return refusal(503, "the server is shutting down.", SOON)
        case Refused():
            return refusal(409, str(error))
        case Unsettled():
            sentence = f"it is done, but the disk does not say that it lasts ({error.strerror})."
            return refusal(503, sentence)
        case OSError():
            sentence = f"the disk refused ({error.strerror}); the memory is as it was before."
            return refusal(503, sentence)
        case _:
            trace = "".join(traceback.format_exception(error))
            say(f"A request to {path} failed:\n{trace}")
            return refusal(500, "the server failed; its log says how.")
