# SPDX-License-Identifier: Apache-2.0
"""What a training run measures at every step, and who is told.

metrics.jsonl   a line a step: loss, gradients, and for each level how long its gradient was, how
                far it moved, where it stands; a function of the configuration alone
speed.jsonl     a line now and then: tokens a second, and on a known device the share of its peak
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nlx_experiments import chips, loggers, runs
from nlx_experiments.config import TrainConfig
from nlx_experiments.errors import Diverged
from nlx_experiments.loggers import Logger
from nlx_experiments.runs import Run

# Steps in a row that changed nothing, after which a run gives up.
SKIPS = 20


class Log:
    """What was measured, fetched from the device and written some steps at a time."""

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        done: int,
        bytes_a_token: float,
        bytes_a_step: float,
        *,
        flops_a_token: float = 0.0,
        last: Callable[[], int | None] = lambda: None,
        others: Sequence[Logger] = (),
        say: Callable[[str], None] = lambda sentence: None,
    ):
        """Appends to the run's metrics and speed, cut back to `done` steps.

        bytes_a_token: the mean of the training text, by which costs of tokens are shared out;
        bytes_a_step: that the targets of a step stand for.
        flops_a_token: as `nlx.inspect.flops` counts a training step. last: the step of the last
        good checkpoint. others: who is told besides. say: receives a sentence for each stretch of
        steps that changed nothing.
        """
        self.bytes_a_token, self.bytes_a_step = bytes_a_token, bytes_a_step
        self.flops_a_token = flops_a_token
        self.run, self.last, self.others, self.say = run, last, others, say
        self.metrics, self.speeds = (run.stream(n, done, say) for n in ("metrics", "speed"))
        self.tokens_a_step = config.batch * config.length
        self.waiting: list[tuple[int, Any]] = []
        self.since: float | None = None
        self.timed = self.skipped = 0
        chip = chips.of(jax.devices()[0].device_kind)
        self.peak = None if chip is None else chip.bfloat16 * jax.device_count()

    def add(self, step: int, measured: Mapping[str, Any]) -> None:
        """Takes what step number `step` measured, still on the device."""
        if self.since is None:  # the first step compiles
            jax.block_until_ready(measured)
            self.since = time.monotonic()
        else:
            self.timed += 1
        self.waiting.append((step, measured))

    def flush(self) -> tuple[float, float, dict[str, float]]:
        """Writes what waits; returns its mean bits per byte, tokens/s and largest update norms.

        Raises:
          Diverged: too many steps in a row changed nothing.
        """
        records, failed = [], None
        for pair in jax.device_get(self.waiting):
            records.append(self._record(*pair))
            failed = failed or self._failed(pair[0])
        runs.append(self.metrics, records)
        if skipped := [r["step"] for r in records if r["skipped"]]:
            self.say(_told(skipped, [r["step"] for r in records if r["spiked"]]))
        if failed is not None:
            raise failed
        now = time.monotonic()
        tokens = self.timed * self.tokens_a_step / (now - (self.since or now) + 1e-9)
        self.waiting, self.since, self.timed = [], now, 0
        speed: dict[str, Any] = {"step": records[-1]["step"], "tokens_per_s": round(tokens, 1)}
        if self.peak is not None:
            speed["mfu"] = round(tokens * self.flops_a_token / self.peak, 4)
        runs.append(self.speeds, [speed])
        for other in self.others:
            for record in records:
                other.tell(record["step"], loggers.flat(record))
            other.tell(speed["step"], loggers.flat(speed))
        updates = {k: max(r["updates"][k] for r in records) for k in records[-1]["updates"]}
        bits = [r["bits_per_byte"] for r in records if r["bits_per_byte"] is not None]
        return float(np.mean(bits)) if bits else math.nan, tokens, updates

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is no part of the tokens a second."""
        begun = time.monotonic()
        yield
        if self.since is not None:
            self.since += time.monotonic() - begun

    def _record(self, step: int, measured: Mapping[str, Any]) -> dict[str, Any]:
        loss, skipped = float(measured["loss"]), int(measured["skipped"])
        self.skipped = self.skipped + 1 if skipped else 0
        bits = loss / math.log(2) / self.bytes_a_token
        norm = float(measured["gradient_norm"])
        return {
            "step": step,
            "bytes": round(step * self.bytes_a_step),
            "bits_per_byte": bits if math.isfinite(loss) else None,
            "skipped": skipped,
            "spiked": int(measured["spiked"]),
            "gradient_norm": norm if math.isfinite(norm) else None,
            "gradients": _under("gradient_norm/", measured),
            "updates": _under("update_norm/", measured),
            "parameters": _under("parameter_norm/", measured),
            "moved": _under("moved/", measured),
        }

    def _failed(self, step: int) -> Diverged | None:
        """Why the run gives up after this step, or None."""
        if self.skipped < SKIPS:
            return None
        last = self.last()
        kept = "no checkpoint" if last is None else f"the last good checkpoint is of step {last}"
        return Diverged(
            f"the gradients of the last {SKIPS} steps, up to {step}, were not finite, or were "
            f"spikes, and changed nothing; {kept} in {self.run.folder}. A lower `learning_rate` "
            "may help, in another folder."
        )


class Profile:
    """jax's profiler, over some steps of a run; TensorBoard and Perfetto show what it writes."""

    def __init__(self, config: TrainConfig, run: Run):
        """Of the steps that `config` says; none by default."""
        self.first, self.steps = config.profile_at, config.profile_steps
        self.folder = run.folder / "profile"
        self.held = contextlib.ExitStack()

    def __enter__(self) -> "Profile":
        """Returns itself."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Ends it."""
        self.held.close()

    def before(self, step: int, measured: Any) -> None:
        """Before a step is begun, `measured` of the one before."""
        if step == self.first:
            jax.block_until_ready(measured)
            self.held.enter_context(jax.profiler.trace(str(self.folder)))
        elif self.first is not None and step == self.first + self.steps:
            jax.block_until_ready(measured)
            self.held.close()


def _told(skipped: list[int], spiked: list[int]) -> str:
    """A sentence on steps of one interval that changed nothing."""
    many = len(skipped) > 1
    steps = (
        f"Steps {skipped[0]} to {skipped[-1]}: {len(skipped)} were"
        if many
        else (f"Step {skipped[0]} was")
    )
    why = "not finite" if not spiked else "a spike"
    if len(spiked) not in (0, len(skipped)):
        why = f"not finite, or, {len(spiked)} times, a spike"
    return f"{steps} skipped: the gradient was {why}; weights and memories stayed as they were."


def _under(prefix: str, measured: Mapping[str, Any]) -> dict[str, float | None]:
    """The measures whose names begin with `prefix`, without it; None for what is no number."""
    names = sorted(name for name in measured if name.startswith(prefix))
    numbers = {name.removeprefix(prefix): float(measured[name]) for name in names}
    return {name: x if math.isfinite(x) else None for name, x in numbers.items()}
