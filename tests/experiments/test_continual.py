"""Methods of continual learning against their equations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nlx_experiments import continual_language
from nlx_experiments import continual_learner as learners
from nlx_experiments import continual_prompt as prompts
from nlx_experiments import continual_rules as rules
from nlx_experiments import continual_tasks as tasks
from nlx_experiments.continual_learner import Learner
from nlx_experiments.continual_methods import METHODS, Plan, stretches
from nlx_experiments.continual_model import Size
from nlx_experiments.continual_tasks import Scenario, Stage
from nlx_experiments.continual_write import Pair, least_squares

from nlx import nn
from nlx.clock import Clock

SIZE = Size(width=16, layers=2, heads=2, hidden=18, length=48)
PLAN = Plan(batch=4, epochs=1, kept=2)
WORDS = ("red", "tall", "fast", "cold")


@pytest.fixture(scope="module")
def model():
    return nn.LanguageModel(SIZE.config(), rngs=nnx.Rngs(0))


def rows_of(labels, repeats=4):
    texts = [f"{n} {WORDS[c]} {WORDS[c]}" for c in labels for n in range(repeats)]
    return tasks.labelled(tasks.encoded(texts, 16), np.repeat(labels, repeats))


@pytest.fixture(scope="module")
def scenario():
    """Two tasks of two classes, whose rows hold their class's word."""
    stages = [Stage(str(c), *[rows_of(c)] * 3, classes=c) for c in ((0, 1), (2, 3))]
    return Scenario("classes", tuple(stages), WORDS)


def learner(method, model, scenario, **plan):
    return Learner(METHODS[method], model, scenario, PLAN._replace(**plan), 0)


def test_least_squares_is_the_minimizer_over_all_it_ever_saw(x64):
    """Five batches one after the other, each seen once, against one solution by age."""
    draw = np.random.default_rng(0)
    keys, values = draw.normal(size=(5, 8, 6)), draw.normal(size=(5, 8, 3))
    for horizon in (np.inf, 4.0):
        rule = least_squares(1.0, horizon, damping=1e-9)
        weights = jnp.zeros((6, 3))
        state = rule.init({"w": Pair(weights, jnp.zeros((6, 6)))})
        for k, v in zip(keys, values, strict=True):
            gradient = k.T @ (k @ weights - v) / 8
            update, state = rule.update({"w": Pair(gradient, jnp.asarray(k.T @ k / 8))}, state)
            weights = weights + update["w"].values
        ages = (1 - 1 / horizon) ** np.arange(4, -1, -1)
        gram = np.einsum("a,ani,anj->ij", ages, keys, keys)
        right = np.einsum("a,ani,ano->io", ages, keys, values)
        np.testing.assert_allclose(weights, np.linalg.solve(gram, right), atol=1e-5)


def test_damping_is_counted_in_first_firings(x64):
    rule = least_squares(0.5, np.inf, damping=3.0)
    gram, gradient = jnp.diag(jnp.array([1.0, 4.0])), jnp.array([[8.0], [8.0]])
    state = rule.init({"w": Pair(gradient, gram)})
    for n in (1, 2):
        update, state = rule.update({"w": Pair(gradient, gram)}, state)
        want = -0.5 * gradient / (jnp.diag(gram)[:, None] * (3 + n))
        np.testing.assert_allclose(update["w"].values, want, rtol=1e-5)


@pytest.mark.parametrize("name", ["fine-tuning", "hope, 2 levels"])
def test_what_is_read_is_what_the_model_reads_and_keys_are_its_hidden_units(model, scenario, name):
    tokens = jnp.asarray(scenario.stages[0].train.tokens)
    want, _ = model.mix(model.embed(tokens))
    one = learner(name, model, scenario)
    got, keys = nnx.merge(one.graph, one.params).mix(tokens)
    np.testing.assert_allclose(got, want, atol=2e-5)
    down = model.blocks[1].feed_forward.levels[0].mlp.down.kernel[...]
    zero = nnx.clone(model)
    zero.blocks[1].feed_forward.levels[0].mlp.down.kernel[...] = jnp.zeros_like(down)
    without, _ = zero.mix(zero.embed(tokens))
    hidden = jnp.concatenate([keys[f"cms_{n}"] for n in range(len(keys))], -1)
    assert len(keys) == (3 if "hope" in name else 1)
    np.testing.assert_allclose(hidden @ down, want - without, atol=2e-5)


def test_only_the_last_layers_values_ever_move(model, scenario):
    one = learner("hope, 2 levels", model, scenario)
    before = nnx.to_flat_state(one.params)
    one.learn(scenario.stages[0], {"rate": 1.0, "horizon": 64.0})
    after = nnx.to_flat_state(one.params)
    moved = [p for (p, a), (_, b) in zip(before, after, strict=True) if (a[...] != b[...]).any()]
    values = lambda n: ("model", "blocks", 1, "feed_forward", "levels", n, "mlp", "down", "kernel")
    assert one.steps == 2
    assert moved == [values(0)]  # the second level's clock has not fired
    one.learn(scenario.stages[1], {"rate": 1.0, "horizon": 64.0})
    after = nnx.to_flat_state(one.params)
    moved = [p for (p, a), (_, b) in zip(before, after, strict=True) if (a[...] != b[...]).any()]
    assert moved == [values(0), values(1)]


@pytest.mark.parametrize("name", ["hope, 2 levels", "hope, 3 levels, adam"])
def test_with_rate_zero_levels_are_the_model_that_was_given(model, scenario, name):
    one = learner(name, model, scenario)
    tokens = jnp.asarray(scenario.stages[0].train.tokens)
    want, _ = model.mix(model.embed(tokens))
    before = jax.tree.leaves(one.params)
    for stage in scenario.stages:
        one.learn(stage, {"rate": 0.0, "horizon": 64.0})
    for a, b in zip(before, jax.tree.leaves(one.params), strict=True):
        np.testing.assert_array_equal(a, b)
    got, _ = nnx.merge(one.graph, one.params).mix(tokens)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_levels_by_adam_move_on_their_periods_mean_and_all_else_stands(model, scenario):
    """Five steps of two levels and one that stands still, against a loop over three thirds."""
    two = METHODS["hope, 1 level, adam"]._replace(levels=2)
    one = Learner(two, model, scenario, PLAN, 0)
    seen = np.array([True, True, False, False])
    rows, labels = scenario.stages[0].train, nn.labels_by_level(nnx.merge(one.graph, one.params))
    moves = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2, b2=0.99))

    def loss(params, batch):
        return rules.task_loss(nnx.merge(one.graph, params), batch, "classes")[0]

    gradient = jax.jit(jax.grad(loss))
    names = jax.tree.leaves(labels)
    assert sorted(set(names)) == ["cms_0", "cms_1", "outer"]
    of = lambda tree, level: [
        x for x, n in zip(jax.tree.leaves(tree), names, strict=True) if n == level
    ]
    params, memories = one.params, one.memories
    start = {n: of(params, n) for n in set(names)}
    now, held = dict(start), {n: moves.init(start[n]) for n in ("cms_0", "cms_1")}
    pending = {n: [] for n in held}
    for step in range(5):
        batch = learners.batch_of(rows.take(np.array([step % 4, step % 4 + 4])), seen)
        given = gradient(params, batch)
        for name, period in (("cms_0", 1), ("cms_1", 4)):
            pending[name].append(of(given, name))
            if (step + 1) % period == 0:
                mean = [sum(g) / period for g in zip(*pending[name], strict=True)]
                moved, held[name] = moves.update(mean, held[name])
                now[name], pending[name] = optax.apply_updates(now[name], moved), []
        choice = {"rate": jnp.float32(1e-2)}
        params, memories = one.functions["step"](params, memories, batch, choice)
        for name, want in now.items():
            for a, b in zip(of(params, name), want, strict=True):
                np.testing.assert_allclose(a, b, atol=2e-4)
    assert all((a == b).all() for a, b in zip(of(params, "outer"), start["outer"], strict=True))
    assert {len(of(params, n)) for n in held} == {2 * 4}  # of both layers: norm, gate, up, down


def test_values_by_adam_move_as_adam_moves_them_and_alone(model, scenario):
    """One step of three levels: the first level's values, clipped by their own gradient's norm."""
    one = learner("hope, 3 levels, values by adam", model, scenario)
    batch = learners.batch_of(scenario.stages[0].train.take(np.arange(4)), one.seen | True)

    def loss(values):
        return rules.task_loss(
            nnx.merge(one.graph, rules.holding(one.params, values)), batch, "classes"
        )[0]

    values = rules.values_of(one.params, 3)
    gradient = jax.grad(loss)(values)["cms_0"]
    moves = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2, b2=0.99))
    wanted = values["cms_0"] + moves.update(gradient, moves.init(gradient))[0]
    choice = {"rate": jnp.float32(1e-2)}
    after, _ = one.functions["step"](one.params, one.memories, batch, choice)
    got = rules.values_of(after, 3)
    np.testing.assert_allclose(got["cms_0"], wanted, atol=2e-4)
    np.testing.assert_array_equal(got["cms_1"], values["cms_1"])
    # of a level: a sum that waits, Adam's two, and two counts; no Gram matrix
    assert one.carried() == sum(4 * (3 * units * 16 + 2) for units in (4, 5, 4)) + 4
    pairs = zip(nnx.to_flat_state(one.params), nnx.to_flat_state(after), strict=True)
    assert sum(bool((a[...] != b[...]).any()) for (_, a), (_, b) in pairs) == 1


def test_levels_on_one_clock_have_the_same_units_and_all_fire_at_every_step(model, scenario):
    one = learner("hope, 3 levels, one clock", model, scenario)
    clocks = nn.clocks_by_level(nnx.merge(one.graph, one.params))
    assert {clocks[f"cms_{n}"] for n in range(3)} == {Clock(1)}
    other = learner("hope, 3 levels", model, scenario)
    shapes = lambda learner: jax.tree.map(jnp.shape, rules.values_of(learner.params, 3))
    assert shapes(one) == shapes(other)
    assert one.carried() == other.carried()


def test_levels_remember_for_the_horizons_that_their_method_says(model, scenario):
    """After n firings a level's memory of its keys holds what one of its horizon holds."""
    assert {name: stretches(METHODS[name]) for name in METHODS if METHODS[name].levels} == {
        "hope, 1 level": (1,),
        "hope, 2 levels": (1, 1),
        "hope, 3 levels": (1, 1, 1),
        "hope, 1 level, long horizon": (16,),
        "hope, 3 levels, one clock": (1, 4, 16),
        "hope, 3 levels, values by adam": (1, 1, 1),
        "hope, 1 level, adam": (1,),
        "hope, 3 levels, adam": (1, 1, 1),
    }
    seen = np.array([True, True, False, False])
    batch = learners.batch_of(scenario.stages[0].train.take(np.array([0, 4])), seen)
    held = {}
    for name, horizon in (("hope, 1 level", 32.0), ("hope, 1 level, long horizon", 2.0)):
        one = learner(name, model, scenario)
        choice = {"rate": jnp.float32(1.0), "horizon": jnp.float32(horizon)}
        params, memories = one.params, one.memories
        for _ in range(3):
            params, memories = one.functions["step"](params, memories, batch, choice)
        held[name] = rules.values_of(params, 1)["cms_0"]
    np.testing.assert_array_equal(*held.values())


def test_what_is_carried_is_counted_and_replay_may_have_as_much(model, scenario):
    size = {name: learner(name, model, scenario).carried() for name in METHODS}
    weights = sum(x.size for x in jax.tree.leaves(learner("ewc", model, scenario).params))
    assert size["fine-tuning"] == size["replay"] == 4 * (2 * weights + 1)  # Adam's, its count
    assert size["ewc"] == 4 * (4 * weights + 1)
    assert size["in context"] == 0
    o = 16  # a level of i units: two sums that wait, S, its first diagonal, count, whether, steps
    level = lambda i: 4 * (i * o + i * i + i * i + i + 1) + 1
    levels = [sum(map(level, units)) + 4 for units in ([9], [6, 6], [4, 5, 4])]
    assert [size[f"hope, {n} level{'s' * (n > 1)}"] for n in (1, 2, 3)] == levels
    one = learner("replay, equal bytes", model, scenario)
    assert one.room == levels[2] // 2
    one.functions = one.functions | {"step": lambda p, m, b, c: (p, m)}
    for stage in scenario.stages:
        one.learn(stage, {"rate": 1e-3})
    assert [len(rows) for rows in one.held] == [8, 8]  # all there are
    one.room = 3 * 20 + 19
    assert len(one._kept(scenario.stages[0])) == 3  # 16 bytes and a label
    assert one.carried() == size["replay"] + 2 * 8 * 20


def test_three_levels_have_the_clocks_of_the_docstring(model, scenario):
    one = learner("hope, 3 levels", model, scenario)
    clocks = nn.clocks_by_level(nnx.merge(one.graph, one.params))
    assert clocks == {"outer": Clock(1)} | {f"cms_{n}": Clock(4**n) for n in range(3)}


def test_each_level_writes_its_periods_mean_when_its_clock_fires(model, scenario):
    """Five steps of two levels: the first writes each gradient, the second the mean of four."""
    one = learner("hope, 2 levels", model, scenario)
    choice = {"rate": jnp.float32(1.0), "horizon": jnp.float32(8.0)}
    seen = np.array([True, True, False, False])
    rows = scenario.stages[0].train

    @jax.jit
    def measured(params, batch):
        def loss(values):
            reader = nnx.merge(one.graph, rules.holding(params, values))
            return rules.task_loss(reader, batch, "classes")

        gradient, keys = jax.grad(loss, has_aux=True)(rules.values_of(params, 2))
        return {n: Pair(g, keys[n].T @ keys[n] / 2) for n, g in gradient.items()}

    rule = least_squares(1.0, 8.0)
    update = jax.jit(rule.update)
    params, memories, pairs = one.params, one.memories, []
    values = rules.values_of(params, 2)
    assert {n: w.shape for n, w in values.items()} == {"cms_0": (6, 16), "cms_1": (6, 16)}
    fast = slow = rule.init(Pair(values["cms_0"], jnp.zeros((6, 6))))
    for n in range(5):
        batch = learners.batch_of(rows.take(np.array([n % 4, n % 4 + 4])), seen)
        pairs.append(measured(params, batch))
        moved, fast = update(pairs[-1]["cms_0"], fast)
        values["cms_0"] = values["cms_0"] + moved.values
        if n == 3:
            mean = jax.tree.map(lambda *x: sum(x) / 4, *[p["cms_1"] for p in pairs])
            moved, slow = update(mean, slow)
            values["cms_1"] = values["cms_1"] + moved.values
        params, memories = one.functions["step"](params, memories, batch, choice)
        for name, got in rules.values_of(params, 2).items():
            np.testing.assert_allclose(got, values[name], rtol=5e-3, atol=5e-3)


def test_fisher_is_the_mean_square_of_the_drawn_answers_gradients(model, scenario):
    one = learner("ewc", model, scenario)
    rows, key = scenario.stages[0].train.take(np.arange(8)), jax.random.key(1)
    seen = np.array([True, True, False, False])
    given = one.functions["remember"](one.params, one.memories, learners.batch_of(rows, seen), key)

    @jax.jit
    def squared(params, tokens, key):
        def scores(params):
            reader = nnx.merge(one.graph, params)
            given = reader.class_scores(reader.mix(tokens)[0], tokens)[:, :2]
            return jax.nn.log_softmax(given)[0]

        told = jnp.pad(scores(params), (0, 2), constant_values=-jnp.inf)
        drawn = jax.random.categorical(key, told[None])[0]
        return drawn, jax.tree.map(jnp.square, jax.grad(lambda p: scores(p)[drawn])(params))

    total, answers = jax.tree.map(jnp.zeros_like, one.params), set()
    for row, own in zip(rows.tokens, jax.random.split(key, 8), strict=True):
        drawn, square = squared(one.params, jnp.asarray(row)[None], own)
        answers.add(int(drawn))
        total = jax.tree.map(lambda t, s: t + s / 8, total, square)
    assert answers == {0, 1}  # so that they are drawn, and are not the labels' or the likeliest
    for a, b in zip(jax.tree.leaves(given.fisher), jax.tree.leaves(total), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_fisher_of_language_is_that_of_one_scored_byte(model):
    """A loss that is a mean over bytes has the information of one, however many a row has."""
    short = continual_language.translated([("ab", "c")] * 4, 16)
    long = continual_language.translated([("ab", "c" * 8)] * 4, 16)
    rows = {2: short, 9: long}
    graph, params = nnx.split(learners.Reader(model, 1, rngs=nnx.Rngs(0)))
    seen = np.zeros(1, bool)

    @jax.jit
    @jax.grad
    def gradient(params, row, key, scored):
        reader = nnx.merge(graph, params)
        scores = reader.model.read_out(reader.mix(row[:, :-1])[0])[0]
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(scores))
        return jnp.sum(jax.nn.log_softmax(scores)[jnp.arange(15), drawn] * scored)

    for count, given in rows.items():
        assert (given.scored[:, 1:].sum(1) == count).all()
        batch = learners.batch_of(given, seen)
        found = rules.fisher(graph, params, batch, jax.random.key(0), "translation")
        total = jax.tree.map(jnp.zeros_like, params)
        for row, key in zip(given.tokens, jax.random.split(jax.random.key(0), 4), strict=True):
            square = jax.tree.map(jnp.square, gradient(params, row[None], key, given.scored[0, 1:]))
            total = jax.tree.map(lambda t, s, n=4 * count: t + s / n, total, square)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(total), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)


def test_the_penalty_pulls_to_every_task_as_each_alone_would(model, scenario):
    draw = np.random.default_rng(0)
    like = lambda: {"w": jnp.asarray(draw.uniform(size=(3,)), jnp.float32)}
    ends, fishers, now = [like(), like()], [like(), like()], like()
    memories = rules.Whole(
        (),
        {"w": fishers[0]["w"] + fishers[1]["w"]},
        {"w": sum(f["w"] * e["w"] for f, e in zip(fishers, ends, strict=True))},
    )
    each = lambda p: sum(
        0.5 * jnp.sum(f["w"] * (p["w"] - e["w"]) ** 2) for f, e in zip(fishers, ends, strict=True)
    )
    got, want = (jax.grad(f)(now)["w"] for f in (lambda p: rules.penalty(p, memories), each))
    np.testing.assert_allclose(got, want, atol=1e-6)
    one = learner("ewc", model, scenario)
    choice = {"rate": 1e-2, "strength": 1e3}
    one.learn(scenario.stages[0], choice)
    end, first = one.params, one.memories
    one.learn(scenario.stages[1], choice)
    for f, a, p in zip(*map(jax.tree.leaves, (first.fisher, first.anchor, end)), strict=True):
        np.testing.assert_allclose(a, f * p, atol=1e-6)
    grown = jax.tree.map(lambda a, b: bool((b >= a).all()), first.fisher, one.memories.fisher)
    assert all(jax.tree.leaves(grown))


def test_a_strong_penalty_holds_the_parameters_and_a_weak_one_does_not(model, scenario):
    def moved(strength):
        one = learner("ewc", model, scenario, epochs=3)
        choice = {"rate": 3e-3, "strength": strength}
        one.learn(scenario.stages[0], choice)
        end, important = one.params, one.memories.fisher
        one.learn(scenario.stages[1], choice)
        parts = jax.tree.map(lambda f, a, b: jnp.sum(f * (a - b) ** 2), important, end, one.params)
        return float(sum(jax.tree.leaves(parts)))

    assert moved(1e6) < 0.5 * moved(0.0)


def test_replay_keeps_its_budget_and_gives_half_of_each_batch(model, scenario, monkeypatch):
    one = learner("replay", model, scenario, kept=3)
    given = []
    step = one.functions["step"]
    one.functions = one.functions | {
        "step": lambda p, m, b, c: (given.append(np.asarray(b.labels)), step(p, m, b, c))[1]
    }
    one.learn(scenario.stages[0], {"rate": 1e-3})
    assert sorted(one.held[0].labels) == [0, 0, 0, 1, 1, 1]
    given.clear()
    one.learn(scenario.stages[1], {"rate": 1e-3})
    assert one.steps == 4
    for labels in given:
        assert len(labels) == 4
        assert (labels < 2).sum() == 2


def test_every_method_takes_the_same_steps(model, scenario):
    rows = []
    stand_in = {
        "step": lambda p, m, b, c: (rows.append(len(b.tokens)), (p, m))[1],
        "remember": lambda p, m, b, k: m,
    }
    learning = {n: m for n, m in METHODS.items() if m.learns != "nothing"}
    for name in learning:
        one = learner(name, model, scenario, epochs=2)
        one.functions = one.functions | stand_in
        rows.clear()
        for stage in scenario.stages:
            one.learn(stage, METHODS[name].grid[0])
        assert (one.steps, rows) == (8, [4] * 8), name
    assert {n for n, m in learning.items() if len(m.grid) != 4} == {"fine-tuning, rate 0.001"}


def test_an_examination_is_among_classes_seen_and_the_tasks_own(model, scenario):
    one = learner("fine-tuning", model, scenario)
    scores = np.array([0.0, 1.0, 3.0, 2.0])
    tall = {"right": lambda p, b, c: _right(scores, b, c)}
    one.functions = one.functions | tall
    first, second = scenario.stages
    assert one.examine(first, first.test) == 0.5  # class 1 wins, 2 and 3 were never seen
    assert one.examine(second, second.test) == 0.5  # class 2 wins
    one.seen[:] = True
    assert one.examine(first, first.test) == 0.0  # class 2 wins over both


def _right(scores, batch, counts):
    given = np.where(batch.seen, scores, -np.inf).argmax()
    return np.sum((batch.labels == given) * counts), np.sum(counts)


@pytest.mark.slow
def test_language_is_scored_where_it_is_asked_and_written_byte_by_byte(model):
    rows = continual_language.translated([("ab", "cd"), ("x", "yz")], 16)
    scenario = Scenario("translation", (Stage("t", rows, rows, rows),))
    one = learner("fine-tuning", model, scenario)
    batch = learners.batch_of(rows, one.seen)
    given = model(batch.tokens[:, :-1])[0]
    lost = optax.softmax_cross_entropy_with_integer_labels(given, batch.tokens[:, 1:])
    told = [lost[0, n - 1] for n in range(5, 8)] + [lost[1, n - 1] for n in range(4, 7)]
    got, keys = rules.task_loss(nnx.merge(one.graph, one.params), batch, "translation")
    np.testing.assert_allclose(got, sum(told) / 6, rtol=1e-5)
    assert (np.abs(keys["cms_0"]).sum(1) > 0).sum() == 6
    tokens, begins = continual_language.asked(rows)
    written = np.asarray(one.functions["write"](one.params, tokens, begins))
    want = tokens.copy()
    for place in range(1, 16):
        likely = np.asarray(model(jnp.asarray(want))[0][:, place - 1].argmax(-1))
        want[:, place] = np.where(place >= begins, likely, want[:, place])
    np.testing.assert_array_equal(written, want)


def test_a_prompt_holds_the_most_alike_examples_nearest_to_the_question():
    known = [prompts.trigrams(t) for t in (b"red house", b"tall tree", b"red horse")]
    assert prompts.alike(prompts.trigrams(b"red house!"), known) == [0, 2, 1]
    assert prompts.prompt(b"q", [b"near\n", b"far\n"], 12) == b"\n\nfar\nnear\nq"
    assert prompts.prompt(b"q", [b"near\n", b"too long to fit\n"], 8) == b"\n\nnear\nq"
    assert prompts.prompt(b"long question", [], 8) == b"question"


def test_a_model_that_copies_answers_as_the_most_alike_example_does(model, scenario, monkeypatch):
    """A stand-in gives 1 to the name that ends the line before the question, and 0 to others."""
    plain = lambda tokens: bytes(np.asarray(tokens)[np.asarray(tokens) > 0].tolist())

    def copier(graph, room):
        def score(params, tokens, names):
            copied = plain(tokens[0]).split(b"\n")[-2].rpartition(b" = ")[2]
            return np.array([plain(name) == b" = " + copied + b"\n" for name in names], float)

        return score

    monkeypatch.setattr(prompts, "_scorer", copier)
    monkeypatch.setattr(prompts, "NAMED", 9)
    known = learners.joined([stage.train for stage in scenario.stages])
    seen = np.ones(4, bool)
    assert prompts.classes(model, known, known, WORDS, seen) == 1.0
    other = dataclasses.replace(known, labels=(known.labels + 1) % 4)
    assert prompts.classes(model, known, other, WORDS, seen) == 0.0


def test_translations_are_copied_from_the_most_alike_example(model, monkeypatch):
    """A stand-in writes what stands after the arrow in the line before the question."""

    def copier(graph, room, count):
        def write(params, tokens):
            lines = [bytes(np.asarray(row).tolist()).split(b"\n") for row in tokens]
            assert {line[-1] for line in lines} == {b"red = ", b"tall = "}
            said = [line[-2].rpartition(b" = ")[2] + b"\n" for line in lines]
            return np.array([list(s.ljust(count)) for s in said])

        return write

    monkeypatch.setattr(prompts, "_writer", copier)
    pairs = [("red", "wamba"), ("tall", "kiluni")]
    rows = continual_language.translated(pairs, 20)
    assert prompts.translations(model, rows, rows) == 1.0
    wrong = continual_language.translated([(a, "zzzz") for a, _ in pairs], 20)
    assert prompts.translations(model, rows, wrong) == 0.0


@pytest.mark.slow
def test_names_are_scored_by_the_likelihood_of_their_bytes(model, scenario, monkeypatch):
    monkeypatch.setattr(prompts, "NAMED", 9)
    rows = scenario.stages[0].test.take(np.array([0, 5]))
    room = 48 - 9
    right = 0
    for row, label in zip(rows.tokens, rows.labels, strict=True):
        question = bytes(row[row > 0].tolist())
        scores = []
        for word in WORDS[:2]:
            whole = prompts.prompt(question, [], room) + f" = {word}\n".encode()
            tokens = jnp.asarray(list(whole))[None]
            told = jax.nn.log_softmax(model(tokens[:, :-1])[0])[0]
            scores.append(np.mean([told[n - 1, whole[n]] for n in range(room, len(whole))]))
        right += int(np.argmax(scores) == label)
    seen = np.array([True, True, False, False])
    assert prompts.classes(model, rows, None, WORDS, seen) == right / 2


@pytest.mark.slow
def test_in_context_nothing_is_learned_and_examples_help_a_model_that_copies(model, scenario):
    one = learner("in context", model, scenario)
    before = jax.tree.leaves(one.params)
    one.learn(scenario.stages[0], {})
    assert one.steps == 0
    assert all(a is b for a, b in zip(before, jax.tree.leaves(one.params), strict=True))
    assert len(one.held[0]) == 8
    text = continual_language.foretold([b"abcdefgh", b"hgfedcba"], 8)
    for kind in ("text", "translation"):
        rows = text if kind == "text" else continual_language.translated([("ab", "cd")], 16)
        stream = Scenario(kind, (Stage("t", rows, rows, rows),))
        one = learner("in context", model, stream)
        one.learn(stream.stages[0], {})
        assert 0 <= one.examine(stream.stages[0], rows) <= 1


def test_text_after_a_prompt_is_scored_as_the_model_reads_it(model):
    rows = continual_language.foretold([b"abcdefgh"], 8)
    known = continual_language.foretold([b"zz"], 8)
    fill = prompts.prompt(b"", [b"zz"] * 16, 40)
    tokens = jnp.asarray(list(fill + b"abcdefgh"))[None]
    likely = np.asarray(model(tokens)[0].argmax(-1))[0]
    want = np.mean([likely[40 + n - 1] == b"abcdefgh"[n] for n in range(1, 8)])
    got = prompts.text(model, rows, known, np.random.default_rng(0))
    assert got == pytest.approx(want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "translation"])
def test_language_is_learned_and_examined_by_every_way_to_learn_it(kind):
    """Four rows are learned by heart, by the methods that can; what is written of them is right."""
    size = dataclasses.replace(SIZE, width=32, hidden=64)
    model = nn.LanguageModel(size.config(), rngs=nnx.Rngs(0))
    pairs = [("ka", "red"), ("mo", "tall"), ("su", "cold"), ("ti", "fast")]
    rows = continual_language.translated(pairs, 16)
    if kind == "text":
        rows = continual_language.foretold([f"{a} {b} {b}".encode() for a, b in pairs], 12)
    stream = Scenario(kind, (Stage("t", rows, rows, rows),) * 2)
    before = learner("fine-tuning", model, stream).examine(stream.stages[0], rows)
    assert before < 0.4
    for name, choice, least in (
        ("fine-tuning", {"rate": 1e-2}, 0.9),
        ("ewc", {"rate": 1e-2, "strength": 1.0}, 0.9),
        ("replay", {"rate": 1e-2}, 0.9),
        ("hope, 3 levels, adam", {"rate": 1e-2}, 0.9),
        ("hope, 3 levels", {"rate": 64.0, "horizon": 256.0}, before),
    ):
        one = learner(name, model, stream, epochs=60)
        for stage in stream.stages:
            one.learn(stage, choice)
        assert one.examine(stream.stages[0], rows) >= least, name


@pytest.mark.slow
def test_what_is_learned_is_kept_by_hope_and_lost_by_fine_tuning():
    size = dataclasses.replace(SIZE, width=32, hidden=192)
    model = nn.LanguageModel(size.config(), rngs=nnx.Rngs(0))
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefghijklmnop"), 6)) for _ in range(12)]

    def rows(classes):
        texts = [f"{draw.integers(1000)} {words[c]}" for c in classes for _ in range(16)]
        return tasks.labelled(tasks.encoded(texts, 16), np.repeat(classes, 16))

    pairs = np.arange(12).reshape(4, 3)
    stages = [Stage(str(p), rows(p), rows(p), rows(p), classes=tuple(map(int, p))) for p in pairs]
    stream = Scenario("classes", tuple(stages), tuple(words))
    kept = {}
    for name, choice in (
        ("fine-tuning", {"rate": 1e-2}),
        ("hope, 3 levels", {"rate": 64.0, "horizon": 256.0}),
    ):
        one = learner(name, model, stream, batch=8, epochs=6)
        for stage in stages:
            one.learn(stage, choice)
        assert one.examine(stages[-1], stages[-1].test) > 0.8, name
        kept[name] = np.mean([one.examine(s, s.test) for s in stages[:-1]])
    assert kept["fine-tuning"] < 0.4
    assert kept["hope, 3 levels"] > 0.6
