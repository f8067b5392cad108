# SPDX-License-Identifier: Apache-2.0
"""A run answers lm-evaluation-harness, and both ways of scoring agree on the same files."""

import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest
from flax import nnx
from nlx_experiments import (
    choice_formats,
    choices,
    config,
    generate,
    harness,
    learner,
    runs,
    tokenization,
)
from nlx_experiments import multiple_choice as multiple
from nlx_experiments.checkpoints import Checkpoints
from nlx_experiments.errors import Refused
from nlx_experiments.run import main as nlx

from nlx import nn

TASKS = pathlib.Path(__file__).parent / "test_choice_formats.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on BPE tokens that has learned nothing yet."""
    folder = tmp_path_factory.mktemp("run") / "run"
    text = "Question: is the cat on the area?\nAnswer: yes, a sky.\n"
    made = tokenization.train([text] * 9, 280)
    small = dict(width=16, layers=1, heads=2, hidden=16, vocabulary=280)
    chosen = config.TrainConfig(
        preset="deltanet-tiny", model=dataclasses.replace(nn.preset("deltanet-tiny"), **small),
        run=folder, tokenizer="bpe",
    )  # fmt: skip
    folder.mkdir()
    runs.write_json(folder / "config.json", config.to_json(chosen))
    (folder / tokenization.FILE).write_text(made.json)
    weights = nnx.split(learner.build(chosen))[1]
    with Checkpoints(folder / "checkpoints", keep=1, say=print) as checkpoints:
        checkpoints.save(1, {"weights": weights}, {})
    return folder


@pytest.fixture(scope="module")
def answers(run):
    return harness.Answers(run, batch=4, longest=16)


def asked(*args):
    return [types.SimpleNamespace(args=one) for one in args]


def test_a_run_is_scored_as_its_model_says(run, answers):
    pairs = [("Question: is it", " yes"), ("", "no"), ("the cat ", "on")]
    found = answers.loglikelihood(asked(*pairs))
    model = learner.load(config.of_run(run))
    for (context, continuation), (likely, greedy) in zip(pairs, found, strict=True):
        before, after = multiple.encode(answers.tokenizer, context, continuation)
        row = np.concatenate([before, after]).astype(np.int32)
        scores = np.asarray(model(row[None, :-1])[0][0], np.float64)
        scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
        at = np.arange(len(before) - 1, len(row) - 1)
        assert likely == pytest.approx(scores[at, row[at + 1]].sum(), rel=1e-4)
        assert greedy == (scores[at].argmax(-1) == row[at + 1]).all()


def test_windows_score_every_token_once():
    """The harness's own example: ten tokens, four at a time."""
    found = harness.windows(np.arange(10), 99, 4)
    read = [np.concatenate([a, b[:-1]]).tolist() for a, b in found]
    assert read == [[99, 0, 1, 2], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert [b.tolist() for _, b in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert harness.windows(np.arange(0), 99, 4) == []


def test_a_whole_text_costs_the_sum_of_its_windows(answers):
    text = "Question: is the cat on the area? Answer: a sky and a hat and a box."
    tokens = answers.tokenizer.encode(text)
    assert len(tokens) > 16
    rolling = answers.loglikelihood_rolling(asked((text,), ("a",), ("",)))
    pieces = harness.windows(tokens, answers.tokenizer.separator, 16)
    parts = multiple.of_tokens(answers.model, pieces, answers.tokenizer.size)
    assert rolling[0] == pytest.approx(sum(likely for likely, _ in parts))
    assert rolling[1] == pytest.approx(answers.loglikelihood(asked(("", "a")))[0][0])
    assert rolling[2] == 0


def test_what_follows_ends_before_a_stop(run, answers):
    settings = {"until": [], "max_gen_toks": 12}
    (whole,) = answers.generate_until(asked(("the cat", settings)))
    model = learner.load(config.of_run(run))
    drawn = generate.stream(model, "the cat", answers.tokenizer, length=12, temperature=0.0, seed=0)
    assert whole == answers.tokenizer.decode(drawn).partition(b"\0")[0].decode(errors="replace")
    stop = next(letter for letter in whole[1:] if letter.isascii())
    (short,) = answers.generate_until(asked(("the cat", settings | {"until": stop})))
    assert short == whole[: whole.index(stop)]
    (one,) = answers.generate_until(asked(("the cat", {"max_gen_toks": 1, "until": ["\n\n"]})))
    assert whole.startswith(one)


def test_the_command_scores_files(run, tmp_path, capsys):
    records = [{"text": "Question: is the cat"}, {"text": "Answer: yes"}]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert nlx(["eval", str(run), f"lambada={tmp_path}/l.jsonl"]) == 0
    said = capsys.readouterr().out
    scores = json.loads((run / "choices.json").read_text())["lambada"]
    model, tokenizer = choices.scorer(run)
    items = choice_formats.read("lambada", tmp_path / "l.jsonl")
    again = multiple.score(model, tokenizer, items)
    assert again.perplexity == pytest.approx(scores.pop("perplexity"), rel=1e-6)
    assert again._asdict() == scores | {"perplexity": again.perplexity}
    assert f"{again.perplexity:.2f}" in said
    for words, sentence in (
        (["eval", str(run)], "choices"),
        (["eval", str(run), "quiz=x"], "the format 'quiz'"),
        (["eval", str(tmp_path), f"lambada={tmp_path}/l.jsonl"], "is no run"),
        (["eval", str(run), f"lambada={tmp_path}/l.jsonl", "--batch", "0"], "`batch` is 0"),
    ):
        assert nlx(words) == 2
        assert sentence in capsys.readouterr().err


def test_without_the_harness_a_sentence(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    with pytest.raises(Refused, match=r"comes with the extra nlx\[eval\]"):
        harness.model(run)


def five_items():
    """Five records of each format, and a last word; `test_choice_formats.py`'s."""
    five = {}
    exec(compile(TASKS.read_text(), str(TASKS), "exec"), five)
    words = [{"text": f"Answer: the {word}"} for word in "cat sky area yes on".split()]
    return {name: rows for name, (rows, _, _) in five["FIVE"].items()} | {"lambada": words}


def prompts(items):
    """What our scorer asks of a model."""
    return [
        (context, f" {choice}")
        for one in items
        for context, choice in zip(one.contexts, one.choices, strict=True)
    ]


@pytest.mark.parametrize("name", choice_formats.FORMATS)
def test_requests_are_encoded_as_our_scorer_does(name, answers, tmp_path, monkeypatch):
    """What a harness would send of each format's five items, as the model gets it from either."""
    sent = []

    def of_tokens(model, pairs, size, *, batch, longest):
        sent.append([(before.tolist(), after.tolist()) for before, after in pairs])
        return [(-1.0, True)] * len(pairs)

    monkeypatch.setattr(multiple, "of_tokens", of_tokens)
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in five_items()[name]))
    items = choice_formats.read(name, path)
    assert len(items) == 5
    answers.loglikelihood(asked(*prompts(items)))
    multiple.score(answers.model, answers.tokenizer, items)
    adapter, scorer = sent
    encoded = [multiple.encode(answers.tokenizer, *pair) for pair in prompts(items)]
    assert adapter == scorer == [(before.tolist(), after.tolist()) for before, after in encoded]
    for (before, after), (context, continuation) in zip(adapter, prompts(items), strict=True):
        assert before[0] == answers.tokenizer.separator
        assert answers.tokenizer.decode(before[1:] + after) == (context + continuation).encode()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_harness_and_our_scorer_agree(run, tmp_path, monkeypatch):
    """The harness's own prompts and metrics, on our five items of each format."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks._yaml_loader import load_yaml

    records = five_items()
    files = {
        "piqa": "piqa/piqa.yaml",
        "hellaswag": "hellaswag/hellaswag.yaml",
        "winogrande": "winogrande/default.yaml",
        "arc_easy": "arc/arc_easy.yaml",
        "arc_challenge": "arc/arc_challenge.yaml",
        "social_iqa": "siqa/siqa.yaml",
        "boolq": "super_glue/boolq/default.yaml",
        "lambada": "lambada/lambada_openai.yaml",
    }
    model, tokenizer = choices.scorer(run)
    for name, file in files.items():
        path = tmp_path / f"{name}.jsonl"
        rows = records[name]
        if name.startswith("arc"):  # the harness reads the hub's form
            rows = [
                {
                    "question": r["question"]["stem"],
                    "choices": {
                        field: [c[field] for c in r["question"]["choices"]]
                        for field in ("text", "label")
                    },
                    "answerKey": r["answerKey"],
                }
                for r in rows
            ]
        if name == "boolq":
            rows = [{k: v for k, v in r.items() if k != "answer"} | {"label": int(r["answer"])}
                    for r in rows]  # fmt: skip
        if name in ("hellaswag", "social_iqa"):  # a column has one type there
            rows = [r | {"label": str(r["label"])} for r in rows]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        task = _task(load_yaml, pathlib.Path(lm_eval.__file__).parent / "tasks" / file, path)
        adapter, sent = harness.model(run), []
        asked_for = adapter.loglikelihood

        def listening(requests, *args, sent=sent, asked_for=asked_for, **named):
            sent += [request.args for request in requests]
            return asked_for(requests, *args, **named)

        monkeypatch.setattr(adapter, "loglikelihood", listening)
        found = lm_eval.simple_evaluate(
            model=adapter, tasks=[task], bootstrap_iters=0, verbosity="ERROR"
        )
        theirs = found["results"][task["task"]]
        items = choice_formats.read(name, path)
        ours = multiple.score(model, tokenizer, items)
        # The same prompts; where white space stands, before or after the cut, changes nothing.
        cut = lambda pairs: sorted(
            tuple(part.tolist() for part in multiple.encode(tokenizer, *pair)) for pair in pairs
        )
        assert cut(sent) == cut(prompts(items)), name
        assert theirs["acc,none"] == pytest.approx(ours.acc), name
        if "acc_norm,none" in theirs:
            assert theirs["acc_norm,none"] == pytest.approx(ours.acc_norm), name
        if name == "lambada":
            assert theirs["perplexity,none"] == pytest.approx(ours.perplexity, rel=1e-6)


def _task(load_yaml, file, path):
    """The harness's task, on a local file."""
    task = load_yaml(file)
    for key in ("tag", "dataset_name", "training_split", "validation_split", "test_split"):
        task.pop(key, None)
    local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
    return task | local | {"test_split": "test", "num_fewshot": 0}
