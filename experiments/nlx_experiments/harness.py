# SPDX-License-Identifier: Apache-2.0
"""A run of `nlx train` as a model of lm-evaluation-harness: the extra `nlx[eval]`.

    import lm_eval
    from nlx_experiments import harness

    lm_eval.simple_evaluate(model=harness.model("runs/hope-tiny"), tasks=["piqa", "lambada_openai"])

The harness asks three things, each with a list of requests whose `args` are: loglikelihood
(context, continuation) -> (log p, whether greedy decoding gives it); loglikelihood_rolling (text,)
-> log p of all of it; generate_until (context, settings) -> the text that follows. Answers are
those of `multiple_choice`, so both ways of scoring agree on the same files.

Reference: Gao et al., A framework for few-shot language model evaluation, `lm_eval.api.model.LM`,
version 0.4.13.
"""

import importlib
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from nlx_experiments import choices, config, generate, learner, multiple_choice
from nlx_experiments.errors import Refused
from nlx_experiments.multiple_choice import BATCH, LONGEST
from nlx_experiments.tokenization import Stream


class Request(Protocol):
    """What is read of the harness's `Instance`."""

    args: tuple[Any, ...]


class Answers:
    """The three answers, without the harness."""

    def __init__(self, run: pathlib.Path | str, batch: int = BATCH, longest: int = LONGEST):
        """run: folder of a run. batch: texts at a time. longest: tokens that are read at once."""
        super().__init__()
        self.folder, self.batch, self.longest = pathlib.Path(run), batch, longest
        self.model, self.tokenizer = choices.scorer(self.folder)

    def loglikelihood(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p in nats, and whether greedy decoding gives it."""
        pairs = [request.args for request in requests]
        return multiple_choice.log_likelihoods(
            self.model, self.tokenizer, pairs, batch=self.batch, longest=self.longest
        )

    def loglikelihood_rolling(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[float]:
        """Of each (text,): log p in nats of the whole, after a separator.

        Longer texts are read in windows of `longest`, each token scored once; the last window
        reaches back, so that it is full.
        """
        texts = [self.tokenizer.encode(request.args[0]) for request in requests]
        pieces = [windows(text, self.tokenizer.separator, self.longest) for text in texts]
        found = iter(
            multiple_choice.of_tokens(
                self.model,
                [pair for pairs in pieces for pair in pairs],
                self.tokenizer.size,
                batch=self.batch,
                longest=self.longest,
            )
        )
        return [math.fsum(next(found)[0] for _ in pairs) for pairs in pieces]

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """Of each (context, settings): what follows, up to the first stop.

        Settings: "until", a string or several that end it and are left out; "max_gen_toks", 256;
        "do_sample" and "temperature", 0: the likeliest token each time.
        """
        loaded = learner.load(config.of_run(self.folder))
        return [self._continued(loaded, *request.args) for request in requests]

    def _continued(self, loaded: Any, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        stops = [s.encode() for s in ([until] if isinstance(until, str) else until) if s]
        warm = float(settings.get("temperature") or 0.0)
        written = b""
        for token in generate.stream(
            loaded,
            context,
            self.tokenizer,
            length=int(settings.get("max_gen_toks", 256)),
            temperature=warm if settings.get("do_sample", warm > 0) else 0.0,
            seed=0,
        ):
            if token == self.tokenizer.separator:  # the text is over
                break
            written += self.tokenizer.decode([token])
            if any(stop in written for stop in stops):
                break
        ends = [at for stop in stops if (at := written.find(stop)) >= 0]
        return written[: min(ends, default=len(written))].decode(errors="replace")


def windows(text: Stream, separator: int, longest: int) -> list[tuple[Stream, Stream]]:
    """(tokens before, tokens to score): each token scored once, at most `longest` read at once."""
    whole = np.concatenate([[separator], text])
    return [
        (whole[max(0, stop - longest) : start + 1], whole[start + 1 : stop + 1])
        for start in range(0, len(text), longest)
        for stop in [min(start + longest, len(text))]
    ]


def model(run: pathlib.Path | str, batch: int = BATCH, longest: int = LONGEST) -> Any:
    """A run as an `lm_eval.api.model.LM`; arguments as of `Answers`.

    Raises:
      Refused: lm-evaluation-harness is not installed, or `run` is no run with a checkpoint.
    """
    try:
        base = importlib.import_module("lm_eval.api.model").LM
    except ImportError as error:
        raise Refused(
            "lm-evaluation-harness is not installed; it comes with the extra nlx[eval]."
        ) from error

    return type("Nlx", (Answers, base), {"__doc__": "A run of nlx."})(run, batch, longest)
