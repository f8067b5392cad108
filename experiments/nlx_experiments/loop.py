# SPDX-License-Identifier: Apache-2.0
"""The training loop: resume, learn, log, save, stop when asked, score at the end.

Whatever depends on the step is derived from the step of the checkpoint: learning rates and clocks
count inside the optimizer's memories, the next batch is a function of the data's position, and
metrics.jsonl is cut back to the step. So a run that was killed at any moment ends in the bits of
one that was not.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nlx.train import TrainState
from nlx_experiments import config as configs
from nlx_experiments import data, evaluate, learner, report, runs, tokenization
from nlx_experiments.checkpoints import Checkpoints
from nlx_experiments.config import TrainConfig
from nlx_experiments.console import StopRequest, display, say
from nlx_experiments.data import Corpus
from nlx_experiments.errors import Diverged, Refused, Stopped
from nlx_experiments.learner import Learner
from nlx_experiments.runs import Run
from nlx_experiments.tokenization import Tokenizer, Tokens

# Steps in a row without a finite gradient after which a run gives up.
SKIPS = 20


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains, or goes on, to the end; returns what result.json holds.

    Raises:
      Refused: bad input, before anything is compiled; or a checkpoint that could not be written.
      Diverged: gradients or scores are no numbers any more.
      Stopped: SIGINT or SIGTERM came; everything is saved.
    """
    corpus, tokens = tokenization.load(
        config.tokenizer, config.model.vocabulary, config.data, config.folder
    )
    dataset = data.training_data(
        tokens.train, length=config.length, batch=config.batch, seed=config.seed
    )
    positions = evaluate.scored_positions(tokens, config.length, config.eval_bytes)
    with Run(config.folder) as run:
        _claim(run, config, corpus, tokens.tokenizer)
        functions = learner.make(config)
        _cache_compilations(run)
        with Checkpoints(run.folder / "checkpoints", keep=config.keep, say=say) as checkpoints:
            state, position = _resume(config, functions, checkpoints)
            result = run.read("result")
            if state.step == config.steps and result is not None:
                say(f"{run.folder} is finished: {_sentence(result)}")
                return result
            runs.note_environment(run, say)
            batches = data.batches(dataset, position)
            with StopRequest() as stop:
                log = Log(config, run, int(state.step), corpus.train.size / tokens.train.size)
                state = _advance(config, functions, run, checkpoints, state, batches, stop, log)
        if stop.received is not None:
            raise Stopped(
                f"{stop.received.name}: step {state.step} of {config.steps} is saved in "
                f"{run.folder}; the same command goes on from there.",
                stop.received,
            )
        bits = evaluate.model_bits(
            lambda tokens: functions.bits(state.params, tokens), tokens, positions, config.batch
        )
        if not np.all(np.isfinite(bits)):
            raise Diverged(
                f"the model of step {state.step} in {run.folder} scores held-out bytes with what "
                "is no number. A lower `learning_rate` may help, in another folder."
            )
        result = _result(config, functions, corpus, tokens, dataset, positions, bits)
        _report(run, config, result)
        run.write("result", result)
        say(f"{run.folder}: {_sentence(result)}")
        return result


def _claim(run: Run, config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Writes what the run is, or refuses a folder in which another run lives."""
    before = run.read("corpus")
    if before is not None and before["sha256"] != corpus.sha256:
        raise Refused(
            f"the text is no longer what {run.folder} was trained on ({len(before['files'])} files "
            f"with {before['train_bytes']} bytes to train on, now {len(corpus.files)} with "
            f"{corpus.train.size}); give it that text, or this run another folder."
        )
    run.agree("config", configs.to_json(config), new={"tokenizer": "bytes"})
    if before is not None and before.get("tokenizer") != tokenizer.sha256:
        raise Refused(
            f"the tokenizer is no longer the one that {run.folder} was begun with "
            f"(`tokenizer` is {config.tokenizer}); give it that file, or this run another folder."
        )
    if tokenizer.json is not None:
        runs.write_whole(run.folder / tokenization.FILE, tokenizer.json)
    if before is None:
        of_tokenizer = {} if tokenizer.json is None else {"tokenizer": tokenizer.sha256}
        run.write("corpus", corpus.record() | of_tokenizer)


def _cache_compilations(run: Run) -> None:
    """A resumed run starts within seconds, unless the process has a cache already."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(run.folder.absolute() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _resume(
    config: TrainConfig, functions: Learner, checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, Any] | None]:
    """State and position in the data, of the last good checkpoint or of a new run."""
    state = functions.init()
    saved = checkpoints.restore(_trees(config, state))
    if saved is None:
        return state, None
    if saved.step < config.steps:
        say(f"Going on from step {saved.step} of {config.steps} in {config.folder}.")
    trees = saved.trees
    step = jnp.asarray(saved.step, state.step.dtype)
    state = TrainState(step, trees["weights"], trees["memories"], trees["rest"]["skipped"])
    return state, saved.position


def _trees(config: TrainConfig, state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds; every random number of the run comes from `key` and the step."""
    rest = {"key": jax.random.key(config.seed), "skipped": state.skipped}
    return {"weights": state.params, "memories": state.opt_state, "rest": rest}


def _advance(
    config: TrainConfig,
    functions: Learner,
    run: Run,
    checkpoints: Checkpoints,
    state: TrainState,
    batches: Any,
    stop: StopRequest,
    log: "Log",
) -> TrainState:
    """Learns until the last step or until asked to stop, and saves there."""
    done, start = int(state.step), functions.init().params
    save = lambda: checkpoints.save(done, _trees(config, state), batches.get_state())
    try:
        with display(run.folder.name, config.steps, done) as shown:
            while done < config.steps and stop.received is None:
                state, measured = functions.step(state, start, next(batches)["tokens"])
                done += 1
                log.add(done, measured)
                saving = done % config.save_every == 0
                if saving or done % config.log_every == 0:
                    shown.show(done, *log.flush())
                if saving:
                    save()
            if log.waiting:
                shown.show(done, *log.flush())
    except BrokenPipeError:  # nobody reads what is printed any more
        save()
        raise
    save()
    return state


class Log:
    """What was measured, fetched from the device and written some steps at a time."""

    def __init__(self, config: TrainConfig, run: Run, done: int, bytes_a_token: float):
        """Appends to the run's metrics and speed, cut back to `done` steps.

        bytes_a_token: the mean of the training text, by which costs of tokens are shared out.
        """
        self.bytes_a_token = bytes_a_token
        self.metrics, self.speeds = run.stream("metrics", done), run.stream("speed", done)
        self.tokens_a_step = config.batch * config.length
        self.waiting: list[tuple[int, Any]] = []
        self.since: float | None = None
        self.timed = self.skipped = 0

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
          Diverged: too many steps in a row had no finite gradient.
        """
        records = [self._record(*pair) for pair in jax.device_get(self.waiting)]
        runs.append(self.metrics, records)
        now = time.monotonic()
        speed = self.timed * self.tokens_a_step / (now - (self.since or now) + 1e-9)
        self.waiting, self.since, self.timed = [], now, 0
        runs.append(self.speeds, [{"step": records[-1]["step"], "tokens_per_s": round(speed, 1)}])
        updates = {k: max(r["updates"][k] for r in records) for k in records[-1]["updates"]}
        bits = [r["bits_per_byte"] for r in records if r["bits_per_byte"] is not None]
        return float(np.mean(bits)) if bits else math.nan, speed, updates

    def _record(self, step: int, measured: Mapping[str, Any]) -> dict[str, Any]:
        loss, skipped = float(measured["loss"]), int(measured["skipped"])
        self.skipped = self.skipped + 1 if skipped else 0
        if self.skipped == SKIPS:
            raise Diverged(
                f"the gradients of the last {SKIPS} steps, up to {step}, were not finite and "
                "changed nothing. A lower `learning_rate` may help, in another folder."
            )
        bits = loss / math.log(2) / self.bytes_a_token
        return {
            "step": step,
            "bytes": round(step * self.tokens_a_step * self.bytes_a_token),
            "bits_per_byte": bits if math.isfinite(loss) else None,
            "skipped": skipped,
            "gradient_norm": float(measured["gradient_norm"]) if not skipped else None,
            "updates": _under("update_norm/", measured),
            "moved": _under("moved/", measured),
        }


def _under(prefix: str, measured: Mapping[str, Any]) -> dict[str, float]:
    """The measures whose names begin with `prefix`, without it."""
    names = sorted(name for name in measured if name.startswith(prefix))
    return {name.removeprefix(prefix): float(measured[name]) for name in names}


def _result(
    config: TrainConfig,
    functions: Learner,
    corpus: Corpus,
    tokens: Tokens,
    dataset: Any,
    positions: np.ndarray,
    bits: np.ndarray,
) -> dict[str, Any]:
    """The score, beside n-gram models fitted on exactly the bytes that were seen."""
    seen, known = data.seen(dataset, config.length, config.steps), tokens.tokenizer
    if known.json is not None:  # from tokens to bytes
        starts = known.starts(tokens.train)
        seen = [(int(starts[a]), int(starts[b])) for a, b in seen]
    scored = evaluate.byte_positions(tokens, positions)
    words = evaluate.words(corpus.heldout, scored)
    ngrams = {str(n): evaluate.ngram_bits(corpus, n, scored, seen) for n in evaluate.ORDERS}
    shown = config.steps * config.batch * config.length
    return {
        "preset": config.preset,
        "optimizer": config.optimizer,
        "parameters": functions.parameters,
        "steps": config.steps,
        "bytes_trained_on": round(shown * corpus.train.size / tokens.train.size),
        "distinct_bytes_seen": sum(stop - start for start, stop in seen),
        "bytes_scored": int(scored.size),
        "words_scored": words,
        "bits_per_byte": evaluate.bits_per_byte(bits, scored.size),
        "word_perplexity": evaluate.word_perplexity(bits, words),
        "ngram_bits_per_byte": ngrams,
    }


def _sentence(result: Mapping[str, Any]) -> str:
    ngrams = ", ".join(f"order-{n} {bits:.3f}" for n, bits in result["ngram_bits_per_byte"].items())
    return (
        f"{result['steps']} steps, {result['bits_per_byte']:.3f} bits per held-out byte "
        f"(Witten-Bell on the same bytes: {ngrams})."
    )


def _report(run: Run, config: TrainConfig, result: Mapping[str, Any]) -> None:
    records = runs.read_lines(run.folder / "metrics.jsonl")
    ngrams = {f"order-{n}": bits for n, bits in result["ngram_bits_per_byte"].items()}
    report.plot_losses(run.folder / "loss.png", {config.preset: records}, ngrams)
    report.plot_levels(run.folder / "levels.png", records)
    scores = [(config.preset, result["bits_per_byte"])]
    scores += [(f"{name} Witten-Bell, same bytes", bits) for name, bits in ngrams.items()]
    page = report.Page(
        title=f"{config.preset}, {config.steps} steps",
        summary=f"Trained with {config.optimizer} on {result['bytes_trained_on']:,} bytes.",
        tables=[report.Table("Held-out text", ("model", "bits per byte"), scores)],
        pictures={
            "Training loss": run.folder / "loss.png",
            "How far each level moved": run.folder / "levels.png",
        },
        details={**configs.to_json(config), **(run.read("environment") or {})},
    )
    report.write(run.folder / "report.html", page)
