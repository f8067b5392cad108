"""Streams of tasks: what is in them, from data that is there or made here."""

import json
import os
import pathlib

import numpy as np
import pytest
from nlx_experiments import continual_digits as pictures
from nlx_experiments import continual_language as language
from nlx_experiments import continual_tasks as tasks
from nlx_experiments.errors import Refused

COUNTS = dict(train=4, validation=1, test=2)
DATA = pathlib.Path(os.environ.get("NLX_DATA", "/nowhere"))


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def clinc(tmp_path):
    """A file of CLINC150's form: every intent's texts name it."""
    intents = [i for names in tasks.DOMAINS.values() for i in names.split()]
    texts = lambda split, n: [[f"{split} {k} {i}", i] for i in intents for k in range(n)]
    held = {"train": texts("train", 5), "val": texts("val", 2), "test": texts("test", 3)}
    path = tmp_path / "data_full.json"
    path.write_text(json.dumps(held))
    return path


def text_of(row):
    return bytes(row[row > 0].tolist()).decode()


def test_clinc_has_ten_domains_of_fifteen_intents_each_met_once(clinc):
    scenario = tasks.clinc(clinc, COUNTS, 64, generator())
    assert [len(s.classes) for s in scenario.stages] == [15] * 10
    assert sorted(c for s in scenario.stages for c in s.classes) == list(range(150))
    for stage in scenario.stages:
        assert [len(r) for r in (stage.train, stage.validation, stage.test)] == [60, 15, 30]
        intents = {i.replace("_", " ") for i in tasks.DOMAINS[stage.name].split()}
        assert {scenario.texts[c] for c in stage.classes} == intents
        for split, rows in (("train", stage.train), ("val", stage.validation)):
            for row, label in zip(rows.tokens, rows.labels, strict=True):
                words = text_of(row).split(maxsplit=2)
                assert words[0] == split
                assert words[2].replace("_", " ") == scenario.texts[label]
    other = tasks.clinc(clinc, COUNTS, 64, generator(1))
    assert [s.name for s in other.stages] != [s.name for s in scenario.stages]


@pytest.mark.skipif(not (DATA / "clinc150").exists(), reason="NLX_DATA holds no clinc150")
def test_the_domains_are_those_of_the_real_file():
    held = json.loads((DATA / "clinc150" / "data_full.json").read_text())
    intents = {i for names in tasks.DOMAINS.values() for i in names.split()}
    assert intents == {label for _, label in held["train"]}


def test_a_file_of_texts_and_labels_is_cut_into_tasks_and_never_leaks(tmp_path):
    path = tmp_path / "mine.csv"
    lines = [f'"text {n}, {c}",class {c}\n' for c in range(5) for n in range(40)]
    for header in ("text,label\n", "text,category\n", "\ufefftext,label\n"):
        path.write_text(header + "".join(lines))
        many = dict(train=40, validation=40, test=40)
        scenario = tasks.labelled_file(path, 2, many, 32, generator())
        assert [len(s.classes) for s in scenario.stages].count(2) == 2
        assert sorted(len(s.classes) for s in scenario.stages) == [1, 2, 2]
        seen: dict[str, set] = {"train": set(), "validation": set(), "test": set()}
        for stage in scenario.stages:
            for split, held in seen.items():
                rows = getattr(stage, split)
                held |= {text_of(row) for row in rows.tokens}
                for row, label in zip(rows.tokens, rows.labels, strict=True):
                    assert text_of(row)[-1] == scenario.texts[label][-1]
        assert sum(map(len, seen.values())) == 200 == len(set().union(*seen.values()))


def test_banking77s_own_test_rows_are_tested_on_and_never_trained_on(tmp_path):
    of = lambda name, n: "".join(
        f"{name} {k} of {c},class {c}\n" for c in range(4) for k in range(n)
    )
    (tmp_path / "train.csv").write_text("text,category\n" + of("train", 20) + of("test", 1))
    (tmp_path / "test.csv").write_text("text,category\n" + of("test", 3))
    many = dict(train=40, validation=40, test=40)
    for stage in tasks.labelled_file(tmp_path, 2, many, 32, generator()).stages:
        assert {text_of(r).split()[0] for r in stage.test.tokens} == {"test"}
        assert (len(stage.train), len(stage.validation), len(stage.test)) == (36, 4, 6)
        rows = [*stage.train.tokens, *stage.validation.tokens]
        assert {text_of(r).split()[0] for r in rows} == {"train"}


def test_a_class_of_three_texts_has_one_in_every_split(tmp_path):
    path = tmp_path / "few.csv"
    path.write_text("text,label\n" + "".join(f"{n},{c}\n" for c in "ab" for n in range(3)))
    for stage in tasks.labelled_file(path, 1, COUNTS, 8, generator()).stages:
        assert [len(r) for r in (stage.train, stage.validation, stage.test)] == [1, 1, 1]
        assert len({text_of(r.tokens[0]) for r in (stage.train, stage.validation, stage.test)}) == 3


def test_digits_come_two_at_a_time_and_permuted_ones_all_at_once():
    scenario = pictures.digits(COUNTS, generator())
    assert sorted(c for s in scenario.stages for c in s.classes) == list(range(10))
    for stage in scenario.stages:
        assert set(stage.train.labels) == set(stage.classes) == set(stage.test.labels)
        assert stage.train.tokens.min() >= 1
        assert stage.train.tokens.max() <= 17
    first, second = pictures.permuted_digits(
        2, dict(train=50, validation=9, test=20), generator()
    ).stages
    np.testing.assert_array_equal(first.train.labels, second.train.labels)
    assert not np.array_equal(first.train.tokens, second.train.tokens)
    np.testing.assert_array_equal(np.sort(first.train.tokens), np.sort(second.train.tokens))
    order = [np.flatnonzero((first.train.tokens.T == c).all(1)) for c in second.train.tokens.T]
    assert all(len(places) for places in order)  # one order of pixels for all rows
    train, test = ({r.tobytes() for r in p.tokens} for p in (first.train, first.test))
    assert not train & test


def test_shuffled_labels_are_the_same_ones_and_tests_keep_theirs():
    scenario = pictures.digits(dict(train=50, validation=2, test=2), generator())
    control = tasks.shuffled(scenario, generator(1))
    for before, after in zip(scenario.stages, control.stages, strict=True):
        assert not np.array_equal(before.train.labels, after.train.labels)
        np.testing.assert_array_equal(np.sort(before.train.labels), np.sort(after.train.labels))
        np.testing.assert_array_equal(before.test.labels, after.test.labels)
    assert tasks.chance(scenario) == (0.5, 0.1)


def test_domains_are_those_of_this_machine_or_those_given(tmp_path, monkeypatch):
    monkeypatch.delenv("NLX_DATA", raising=False)
    scenario = language.domains((), COUNTS, 32, generator())
    assert {s.name for s in scenario.stages} >= {"code pages", "names", "sums"}
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 1000)
    scenario = language.domains((tmp_path / "a", tmp_path / "b"), COUNTS, 32, generator())
    assert {s.name for s in scenario.stages} == {"a", "b"}
    for stage in scenario.stages:
        assert len(stage.train) == 4
        assert set(stage.train.tokens.ravel()) == {ord(stage.name)}
        assert (stage.train.scored[:, 0] == 0).all()
        assert (stage.train.scored[:, 1:] == 1).all()
    text = b"".join(b"%04d" % n for n in range(800))  # in order, as a list of words may be
    (tmp_path / "c").write_bytes(text)
    (stage,) = language.domains(
        (tmp_path / "c",), dict(train=99, validation=99, test=99), 32, generator()
    ).stages
    parts = [stage.train.tokens, stage.validation.tokens, stage.test.tokens]
    assert [len(p) for p in parts] == [70, 10, 20]
    assert sorted(row.astype(np.uint8).tobytes() for p in parts for row in p) == [
        text[n : n + 32] for n in range(0, 3200, 32)
    ]  # every window once, and those that are tested on stand among those trained on
    for part in parts:
        assert {bytes(row[:2].tolist()) < b"04" for row in part} == {True, False}
    with pytest.raises(Refused, match="the domain a has 1000 bytes; it must have 2000 or more"):
        language.domains((tmp_path / "a",), COUNTS, 200, generator())
    with pytest.raises(Refused, match="`domains` holds a, a; no two may have the same name"):
        language.domains((tmp_path / "a", tmp_path / "x" / "a"), COUNTS, 32, generator())


@pytest.fixture
def kalamang(tmp_path):
    """A dictionary of Kalamang's form."""
    said = [(f"kala {n} mang", f"word {n} here") for n in range(60)]
    lines = "".join(f"X{n},{a},{b}\n" for n, (a, b) in enumerate(said))
    (tmp_path / "examples.csv").write_text("ID,Primary_Text,Translated_Text\n" + lines)
    (tmp_path / "entries.csv").write_text("ID,Headword\n1,wat\n2,pun\n")
    (tmp_path / "senses.csv").write_text("Entry_ID,Description\n1,coconut\n2,seed\n3,nothing\n")
    return tmp_path


def test_a_language_comes_from_its_dictionary_and_its_sentences(kalamang):
    counts = dict(train=30, validation=2, test=4)
    (stage,) = language.translation(kalamang, False, counts, 48, generator()).stages
    texts = [text_of(row) for row in stage.train.tokens]
    assert len(texts) == 30
    assert {"wat = coconut\n", "pun = seed\n"} <= set(texts)
    row, scored = stage.test.tokens[0], stage.test.scored[0]
    number = text_of(row).split()[1]
    assert bytes(row[scored > 0].tolist()).decode() == f"word {number} here\n"
    assert not {text_of(r) for r in stage.test.tokens} & set(texts)
    hidden, begins = language.asked(stage.test)
    assert text_of(hidden[0]) == f"kala {number} mang = "
    assert begins[0] == len(f"kala {number} mang = ")
    other, own = language.translation(kalamang, True, counts, 48, generator()).stages
    assert (other.name, own.name) == ("made-up", "kalamang")
    made, meant = text_of(other.test.tokens[0]).split(" = ")
    assert language.made_up(meant) == made
    assert language.made_up("One two.") == " ".join(
        [language.made_up("two"), language.made_up("one")]
    )


def test_a_translation_that_two_sentences_share_is_not_asked_in_the_made_up_language(kalamang):
    said = [(f"kala {n} mang", f"word {n % 100} here") for n in range(120)]
    lines = "".join(f"X{n},{a},{b}\n" for n, (a, b) in enumerate(said))
    (kalamang / "examples.csv").write_text("ID,Primary_Text,Translated_Text\n" + lines)
    counts = dict(train=150, validation=99, test=99)
    stages = language.translation(kalamang, True, counts, 48, generator()).stages
    for stage in stages:
        trained = {text_of(row) for row in stage.train.tokens}
        for rows in (stage.validation, stage.test):
            assert not trained & {text_of(row) for row in rows.tokens}


def test_chrf_is_one_for_what_was_meant_and_near_zero_for_what_was_not(kalamang):
    rows = language.translated([("a", "the house"), ("b", "a tree")], 32)
    assert language.chrf([b"the house\nmore", b"a tree\n"], rows) == pytest.approx(1.0)
    assert language.chrf([b"zzz\n", b"qqq\n"], rows) == 0
    half = language.chrf([b"the house\n", b"qqq\n"], rows)
    assert 0.3 < half < 0.9


@pytest.mark.skipif(not (DATA / "kalamang").exists(), reason="NLX_DATA holds no kalamang")
def test_the_real_dictionary_is_read():
    folder = DATA / "kalamang"
    assert len(language.sentences(folder)) > 1000
    assert ("Kara gonggungnin.", "[They] didn't call you.") in language.sentences(folder)
    assert len(language.dictionary(folder)) > 2000


def test_bad_input_gets_a_sentence(tmp_path, clinc, monkeypatch, capsys):
    monkeypatch.delenv("NLX_DATA", raising=False)
    with pytest.raises(tasks.Absent, match="clinc150 needs NLX_DATA"):
        tasks.found("clinc150")
    monkeypatch.setenv("NLX_DATA", str(tmp_path))
    with pytest.raises(tasks.Absent, match="there is no kalamang under NLX_DATA"):
        tasks.found("kalamang")
    with pytest.raises(Refused, match="gone does not exist; it must be the file or folder of x"):
        tasks.found("x", tmp_path / "gone")
    bad = tmp_path / "bad.csv"
    bad.write_text("a,b\n1,2\n")
    with pytest.raises(
        Refused, match="must be a CSV file in UTF-8 with the columns text and label"
    ):
        tasks.labelled_file(bad, 2, COUNTS, 32, generator())
    bad.write_text("text,label\n")
    with pytest.raises(Refused, match="must hold three texts or more of some label"):
        tasks.labelled_file(bad, 2, COUNTS, 32, generator())
    bad.write_text("text,label\none,a\n" + "".join(f"{n},b\n" for n in range(3)))
    (stage,) = tasks.labelled_file(bad, 2, COUNTS, 32, generator()).stages
    assert "1 classes of fewer than three texts are left out: a." in capsys.readouterr().out
    assert len(stage.classes) == 1
    with pytest.raises(ValueError, match="`classes` is 0; it must be an integer >= 1"):
        tasks.labelled_file(bad, 0, COUNTS, 32, generator())
    with pytest.raises(ValueError, match="`tasks` is 0; it must be an integer >= 1"):
        pictures.permuted_digits(0, COUNTS, generator())
    bad.write_text("text,label\none\n")
    with pytest.raises(Refused, match="must be a CSV file in UTF-8 with the columns text and"):
        tasks.labelled_file(bad, 2, COUNTS, 32, generator())
    held = json.loads(clinc.read_text()) | {"val": []}
    clinc.write_text(json.dumps(held))
    with pytest.raises(Refused, match="has no text in the split `validation`"):
        tasks.clinc(clinc, COUNTS, 32, generator())
    bad.write_text("{}")
    with pytest.raises(Refused, match="must be CLINC150's data_full.json: an object whose `train`"):
        tasks.clinc(bad, COUNTS, 32, generator())
    with pytest.raises(Refused, match=r"examples.csv must be a CSV file .* Primary_Text and Trans"):
        language.sentences(tmp_path)
