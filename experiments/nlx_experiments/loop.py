# SPDX-License-Identifier: Apache-2.0
"""The training loop: resume, learn, log, save, stop when asked, score at the end.

Whatever depends on the step is derived from the step of the checkpoint: learning rates and clocks
count inside the optimizer's memories, the next batch is a function of the data's position, and
metrics.jsonl is cut back to the step. So a run that was killed at any moment ends in the bits of
one that was not.
"""

import contextlib
import functools
import hashlib
import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nlx.train import TrainState
from nlx_experiments import (
    batching,
    console,
    evaluate,
    hosts,
    learner,
    loggers,
    probe,
    report,
    runs,
    shards,
    tokenization,
)
from nlx_experiments import config as configs
from nlx_experiments.checkpoints import Checkpoints
from nlx_experiments.config import TrainConfig
from nlx_experiments.console import Silent, StopRequest, display
from nlx_experiments.data import Corpus
from nlx_experiments.errors import Diverged, Refused, Stopped
from nlx_experiments.learner import Learner
from nlx_experiments.ledger import Ledger
from nlx_experiments.probe import Probe
from nlx_experiments.record import Log, Profile
from nlx_experiments.runs import Run
from nlx_experiments.tokenization import Tokenizer, Tokens


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains, or goes on, to the end; returns what result.json holds.

    Raises:
      Refused: bad input, before anything is compiled; or a checkpoint that could not be written.
      Diverged: gradients or scores are no numbers any more.
      Stopped: SIGINT or SIGTERM came, or the time is over; everything is saved.
    """
    begun = time.monotonic()
    hosts.join(config.hosts)
    say = console.say if hosts.first() else lambda sentence: None
    stop = StopRequest(config.time_limit)
    corpus, tokens = tokenization.load(
        config.tokenizer, config.model.vocabulary, config.data, config.folder
    )
    if config.weights and not isinstance(tokens.train, list):
        raise Refused("`weights` is given; `data` must then be folders that `nlx data` wrote.")
    made = batching.sources(
        tokens.train, length=config.length, pack=config.pack, separator=tokens.tokenizer.separator
    )
    mixed = functools.partial(
        batching.mixed, made, batch=config.batch, seed=config.seed, weights=config.weights
    )
    dataset = mixed()
    sizes = _bytes(config, corpus, tokens, made)
    positions = evaluate.scored_positions(tokens, config.length, config.eval_bytes)
    if config.hosts.coordinator is not None:  # before the first exchange, which is compiled
        _cache_compilations(config.folder)
    content = {"text": corpus.sha256, "tokenizer": tokens.tokenizer.sha256}
    content["init_from"] = _digest(config.init_from)
    hosts.agree("configurations", _shared(config) | content)
    locked = hosts.by_first(lambda: Run(config.folder))
    with locked or Run(config.folder, writes=False) as run:
        hosts.by_first(lambda: _claim(run, config, corpus, tokens.tokenizer))
        functions = learner.make(config)
        _cache_compilations(run.folder)
        with Checkpoints(
            run.folder / "checkpoints", keep=config.keep, keep_every=config.keep_every, say=say
        ) as checkpoints:
            state, position = _resume(config, functions, checkpoints, say)
            result = run.read("result")
            finished = result is not None and int(state.step) == config.steps
            if hosts.any_of(finished):
                assert result is not None  # all processes see one folder
                say(f"{run.folder} is finished: {_sentence(result)}")
                return result
            hosts.by_first(lambda: runs.note_environment(run, say))
            own = dataset if functions.rows is None else mixed(rows=functions.rows)
            batches = batching.batches(own, position, config.workers)
            ledger, done = Ledger(run.read("time"), begun, _lost(run)), int(state.step)
            told = configs.to_json(config)
            make = lambda: [loggers.make(name, run.folder, told) for name in config.log]
            others = hosts.by_first(make) or []
            log = Log(
                config,
                run,
                done,
                *sizes,
                flops_a_token=learner.flops_a_token(config),
                last=checkpoints.last,
                others=others,
                say=say,
            )
            look = probe.make(config, tokens, run.stream("probe", done))
            with stop, contextlib.closing(batches), Profile(config, run) as profile:
                course = Course(run, checkpoints, batches, stop, log, ledger, look, profile)
                state = _advance(config, functions, course, state)
            for other in others:
                other.close()
            run.write("time", ledger.told())
        if hosts.any_of(stop.asked):
            number = hosts.largest(stop.received or 0)  # a signal to one of them stops them all
            received = signal.Signals(number) if number else None
            name = "time limit" if received is None else received.name
            raise Stopped(
                f"{name}: step {state.step} of {config.steps} is saved in {run.folder}; the same "
                "command goes on from there.",
                received,
            )
        with ledger.spent("evaluation"):
            bits = evaluate.model_bits(
                lambda rows: functions.bits(state.params, rows, _segments(config, tokens, rows)),
                tokens,
                positions,
                config.batch // config.accumulate,
            )
        if not np.all(np.isfinite(bits)):
            raise Diverged(
                f"the model of step {state.step} in {run.folder} scores held-out bytes with what "
                "is no number. A lower `learning_rate` may help, in another folder."
            )
        result = _result(config, functions, corpus, tokens, dataset, positions, bits, sizes[1])
        if hosts.first():
            _report(run, config, result)
        run.write("result", result)
        run.write("time", ledger.told())
        say(f"{run.folder}: {_sentence(result)}")
        return result


def _shared(config: TrainConfig) -> dict[str, Any]:
    """What all processes of a training must be told alike."""
    told = configs.to_json(config)
    return {name: value for name, value in told.items() if name not in ("hosts", "data")}


def _claim(run: Run, config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Writes what the run is, or refuses a folder in which another run lives."""
    before = run.read("corpus")
    if before is not None and before["sha256"] != corpus.sha256:
        raise Refused(
            f"the text is no longer what {run.folder} was trained on ({len(before['files'])} files "
            f"with {before['train_bytes']} bytes to train on, now {len(corpus.files)} with "
            f"{corpus.train_bytes}); give it that text, or this run another folder."
        )
    first = {"init_from_sha256": _digest(config.init_from)}
    older = {"tokenizer": "bytes", "pack": False, "weights": [], **first}
    run.agree("config", configs.to_json(config) | first, new=older)
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


def _digest(path: pathlib.Path | None) -> str | None:
    """Of the file that a run's weights begin with."""
    if path is None:
        return None
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"`init_from` is {path}, which cannot be read: {error.strerror}.") from error


def _bytes(
    config: TrainConfig, corpus: Any, tokens: Tokens, made: list[Any]
) -> tuple[float, float]:
    """The bytes of a target and of a step, in the mean; of several folders as they are mixed."""
    if isinstance(corpus, shards.Prepared):
        each = [part["train"]["bytes"] / part["train"]["tokens"] for part in corpus.folders]
    else:
        each = [corpus.train_bytes / tokens.train_size]
    targets = batching.shares(made, config.weights) * [source.targets for source in made]
    of_row = float(targets @ each)
    return of_row / float(targets.sum()), config.batch * of_row


def _segments(config: TrainConfig, tokens: Tokens, rows: np.ndarray) -> np.ndarray | None:
    """Of held-out rows, where those trained on are packed: memories begin at separators, too."""
    if not config.pack:
        return None
    return np.cumsum(rows == tokens.tokenizer.separator, axis=1, dtype=np.int32)


def _lost(run: Run) -> float:
    """Seconds between the last save, or a run's beginning, and the last step told before a kill."""
    at = lambda *names: [p.stat().st_mtime for n in names if (p := run.folder / n).exists()]
    saved, told = at("time.json", "corpus.json"), at("metrics.jsonl")
    return max(0.0, told[0] - saved[0]) if saved and told else 0.0


def _cache_compilations(folder: pathlib.Path) -> None:
    """A resumed run starts within seconds, unless the process has a cache already."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _resume(
    config: TrainConfig,
    functions: Learner,
    checkpoints: Checkpoints,
    say: Callable[[str], None],
) -> tuple[TrainState, dict[str, Any] | None]:
    """State and position in the data, of the last good checkpoint or of a new run."""
    state = functions.init()
    saved = checkpoints.restore(_trees(config, state))
    if saved is None:
        return state, None
    if saved.step < config.steps:
        say(f"Going on from step {saved.step} of {config.steps} in {config.folder}.")
    trees = saved.trees
    step = functions.whole(jnp.asarray(saved.step, state.step.dtype))
    rest = trees["rest"]
    state = TrainState(step, trees["weights"], trees["memories"], rest["skipped"], rest["recent"])
    return state, saved.position


def _trees(config: TrainConfig, state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds; every random number of the run comes from `key` and the step."""
    key = jax.random.key(config.seed)
    rest = {"key": key, "skipped": state.skipped, "recent": state.recent}
    return {"weights": state.params, "memories": state.opt_state, "rest": rest}


class Course(NamedTuple):
    """What goes along with the steps of a training."""

    run: Run
    checkpoints: Checkpoints
    batches: Any
    stop: StopRequest
    log: Log
    ledger: Ledger
    probe: Probe
    profile: Profile


def _advance(
    config: TrainConfig, functions: Learner, course: Course, state: TrainState
) -> TrainState:
    """Learns until the last step or until asked to stop, and saves there."""
    done, start, spent = int(state.step), functions.init().params, course.ledger.spent
    kind, measured = "compile", None

    def save() -> None:
        with spent("save"), course.log.paused():
            course.checkpoints.save(done, _trees(config, state), course.batches.get_state())
        course.run.write("time", course.ledger.told())

    def flushed() -> Any:
        with spent("step"):  # here the device is waited for
            return course.log.flush()

    try:
        first = hosts.first()
        shown = display(course.run.folder.name, config.steps, done) if first else Silent()
        with shown:
            while done < config.steps and not _stopping(config, course.stop, done):
                with spent("data"):
                    batch = next(course.batches)
                    del batch["window"]  # its number
                course.profile.before(done + 1, measured)
                with spent(kind):
                    state, measured = functions.step(state, start, batch)
                    done += 1
                    course.log.add(done, measured)
                kind = "step"
                saving = done % config.save_every == 0
                if saving or done % config.log_every == 0:
                    shown.show(done, *flushed())
                if config.probe_every is not None and done % config.probe_every == 0:
                    with spent("evaluation"), course.log.paused():
                        course.probe(done, state.params)
                if saving and course.log.skipped < 2:  # a streak may end in giving up
                    save()
            if course.log.waiting:
                shown.show(done, *flushed())
    except BrokenPipeError:  # nobody reads what is printed any more
        if hosts.count() == 1:  # the others are in the middle of a step
            save()
        raise
    save()
    with spent("save"):
        course.checkpoints.wait()  # what is said to be saved is
    return state


def _stopping(config: TrainConfig, stop: StopRequest, done: int) -> bool:
    """Whether to save and leave; several processes ask each other only now and then."""
    if hosts.count() == 1:
        return stop.asked
    return done % config.log_every == 0 and hosts.any_of(stop.asked)


def _result(
    config: TrainConfig,
    functions: Learner,
    corpus: Corpus,
    tokens: Tokens,
    dataset: Any,
    positions: np.ndarray,
    bits: np.ndarray,
    bytes_a_step: float,
) -> dict[str, Any]:
    """The score; of windows of a text, beside n-gram models of exactly the bytes that were seen."""
    scored = evaluate.byte_positions(tokens, positions)
    words = evaluate.words(corpus.heldout, scored)
    seen, ngrams = None, {}
    if isinstance(corpus, Corpus) and not config.pack:
        seen = _seen(config, dataset, tokens)
        ngrams = {str(n): evaluate.ngram_bits(corpus, n, scored, seen) for n in evaluate.ORDERS}
    return {
        "preset": config.preset,
        "optimizer": config.optimizer,
        "parameters": functions.parameters,
        "steps": config.steps,
        "bytes_trained_on": round(config.steps * bytes_a_step),
        "distinct_bytes_seen": seen and sum(stop - start for start, stop in seen),
        "bytes_scored": int(scored.size),
        "words_scored": words,
        "bits_per_byte": evaluate.bits_per_byte(bits, scored.size),
        "word_perplexity": evaluate.word_perplexity(bits, words),
        "ngram_bits_per_byte": ngrams,
    }


def _seen(config: TrainConfig, dataset: Any, tokens: Tokens) -> list[tuple[int, int]]:
    """The stretches of the training text, in bytes, that were shown."""
    seen, known = batching.seen(dataset, config.length, config.steps), tokens.tokenizer
    if known.json is None:
        return seen
    starts = known.starts(tokens.train)
    return [(int(starts[a]), int(starts[b])) for a, b in seen]


def _sentence(result: Mapping[str, Any]) -> str:
    ngrams = ", ".join(f"order-{n} {bits:.3f}" for n, bits in result["ngram_bits_per_byte"].items())
    beside = f" (Witten-Bell on the same bytes: {ngrams})" if ngrams else ""
    bits = result["bits_per_byte"]
    return f"{result['steps']} steps, {bits:.3f} bits per held-out byte{beside}."


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
