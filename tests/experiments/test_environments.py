"""Environments against their equations by hand; lifetimes that go through episodes and switches."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nlx_experiments import bandits, cartpole, environments, gridworld, mazes
from nlx_experiments.environments import World
from nlx_experiments.errors import Refused

WORLDS = {
    "bandit": bandits.switching_bandit(4, 12, (4, 8)),
    "contexts": bandits.switching_contexts((1, 3), 4, 12, (4, 8)),
    "goal": gridworld.switching_goal(3, 12, (4, 8)),
    "compass": gridworld.switching_compass(5, 12, (4, 8)),
    "cart-pole": cartpole.switching_physics(12, (4, 8)),
    "t-maze": mazes.walks("t-maze", mazes.t_maze, (1, 3), 12),
    "chain": mazes.walks("chain", mazes.memory_chain, (1, 3), 12),
}


def lived(world, key, actions):
    """A lifetime under given actions: lives [n + 1], outcomes [n]."""
    life = environments.begin(world, key)
    lives, outcomes = [life], []
    for n, action in enumerate(actions):
        life, outcome = environments.live(world, jax.random.fold_in(key, n), life, action)
        lives.append(life)
        outcomes.append(outcome)
    return lives, outcomes


@pytest.mark.parametrize("name", WORLDS)
def test_worlds_keep_their_sizes_and_are_pure(name, key):
    world = WORLDS[name]
    size = environments.percept_size(world.environment)
    begin = jax.jit(lambda key: environments.begin(world, key))
    live = jax.jit(lambda key, life, action: environments.live(world, key, life, action))
    life = begin(key)
    for n in range(world.length):
        assert life.percept.shape == (size,)
        assert life.percept.dtype == jnp.float32
        step = jax.random.fold_in(key, n)
        action = jnp.int32(n % world.environment.actions)
        after, outcome = live(step, life, action)
        again, same = live(step, life, action)
        jax.tree.map(np.testing.assert_array_equal, (after, outcome), (again, same))
        assert jax.tree.structure(after) == jax.tree.structure(life)
        shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
        assert shapes(after) == shapes(life)
        assert np.isfinite(outcome.regret)
        life = after
    assert life.tick == world.length


def test_the_agent_is_told_its_action_the_reward_and_beginnings(key):
    world = mazes.walks("chain", mazes.memory_chain, (2, 2), 9)
    lives, outcomes = lived(world, key, [1, 0, 1, 0])
    sign = 2 * int(lives[0].state.sign) - 1
    assert lives[0].percept.tolist() == [sign, 0, 0, 0, 0, 1]  # nothing before, a beginning
    assert lives[1].percept.tolist() == [0, 0, 0, 1, 0, 0]
    assert lives[2].percept.tolist() == [0, 1, 1, 0, 0, 0]  # it is asked for
    reward = 1.0 if lives[2].state.sign == 1 else -1.0
    assert outcomes[2].reward == reward
    assert lives[3].percept[2:].tolist() == [0, 1, reward, 1]
    assert abs(lives[3].percept[0]) == 1  # the next episode's sign
    assert [bool(o.done) for o in outcomes] == [False, False, True, False]
    assert lives[3].state.place == 0
    assert lives[3].tick == 3


def test_what_holds_changes_at_the_switch_and_goes_on_through_episodes(key):
    def draw(key):
        return jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])

    world = World("bandit", bandits.bandit(2), draw, 9, (5, 5))
    lives, outcomes = lived(world, key, [0] * 9)
    assert [float(o.reward) for o in outcomes] == [1] * 5 + [0] * 4
    assert [float(o.regret) for o in outcomes] == [0] * 5 + [1] * 4
    still = world._replace(switch=None)
    assert all(o.reward == 1 for o in lived(still, key, [0] * 9)[1])
    switches = jax.vmap(lambda key: environments.begin(world._replace(switch=(3, 6)), key).switch)
    assert set(switches(jax.random.split(key, 64)).tolist()) == {3, 4, 5, 6}


def test_regret_is_of_the_mean_reward_where_that_is_known(key):
    draw = lambda key: (jnp.array([0.25, 0.75]),) * 2
    world = World("bandit", bandits.bandit(2), draw, 40)
    _, outcomes = lived(world, key, [0] * 40)
    assert all(o.regret == 0.5 for o in outcomes)
    assert {float(o.reward) for o in outcomes} == {0.0, 1.0}


def test_the_good_arm_is_another_one_after_the_switch(key):
    world = bandits.switching_bandit(3, 10, (5, 5))
    before, after = jax.vmap(world.draw)(jax.random.split(key, 50))
    assert np.all(before.argmax(1) != after.argmax(1))
    assert set(np.unique(before.argmax(1))) == {0, 1, 2}
    np.testing.assert_allclose(np.sort(before, 1), [[0.1, 0.1, 0.9]] * 50)


def test_every_context_has_an_arm_of_its_own_that_moves(key):
    world = bandits.switching_contexts((1, 4), 3, 10, (5, 5))
    before, after = jax.vmap(world.draw)(jax.random.split(key, 40))
    for chances in (before.chances, after.chances):
        np.testing.assert_array_equal(np.sort(chances, 2), np.tile([0, 0, 1], (40, 4, 1)))
    good = lambda params: params.chances.argmax(-1)
    assert np.all(good(before) != good(after))
    assert any(len(set(row.tolist())) > 1 for row in good(before))
    np.testing.assert_array_equal(before.shown, after.shown)
    assert set(before.shown.tolist()) == {1, 2, 3, 4}
    first, then = (jax.tree.map(lambda z: z[0], params) for params in (before, after))
    for n in range(3):
        shown = jnp.int32(n)
        assert world.environment.step(key, shown, good(first)[n], first)[2] == 1
        assert world.environment.step(key, shown, good(then)[n], first)[2] == 0
    assert world.environment.best(first) == 1
    halves = bandits.Contexts(jnp.array([[0.2, 0.4], [0.8, 0.1], [1.0, 1.0]]), jnp.int32(2))
    three = bandits.contextual_bandit(3, 2)
    np.testing.assert_allclose(three.best(halves), 0.6)  # of the two that occur
    for number in (1, 2, 4):
        occur = first._replace(shown=jnp.int32(number))
        seen = jax.vmap(lambda key, occur=occur: world.environment.reset(key, occur)[1])
        assert set(seen(jax.random.split(key, 60)).tolist()) == set(range(number))


def test_a_room_by_hand():
    room = gridworld.gridworld(3)
    told, place = room.reset(jax.random.key(0), room.params)
    assert place.tolist() == [1, 1]
    assert told.tolist() == [0, 1, 0, 0, 1, 0]
    here = gridworld.Room(jnp.array([0, 2]), jnp.int32(0))
    step = lambda place, action, params: room.step(None, jnp.array(place), action, params)[1:4]
    place, reward, done = step([1, 1], 0, here)  # up
    assert (place.tolist(), float(reward), bool(done)) == ([0, 1], 0, False)
    place, reward, done = step([0, 1], 1, here)  # right, where the goal is
    assert (place.tolist(), float(reward), bool(done)) == ([0, 2], 1, True)
    assert step([0, 1], 0, here)[0].tolist() == [0, 1]  # a wall
    turned = here._replace(turn=jnp.int32(1))
    assert step([1, 1], 0, turned)[0].tolist() == [1, 2]
    assert room.best(here) == 0.5
    assert gridworld.gridworld(5).best(here._replace(goal=jnp.array([0, 0]))) == 0.25


def test_switches_of_rooms_keep_what_stays(key):
    for make, same in ((gridworld.switching_goal, "turn"), (gridworld.switching_compass, "goal")):
        before, after = jax.vmap(make(5, 10, (5, 5)).draw)(jax.random.split(key, 40))
        np.testing.assert_array_equal(getattr(before, same), getattr(after, same))
        assert set(before.goal.ravel().tolist()) == {0, 4}  # corners
        other = "goal" if same == "turn" else "turn"
        changed = getattr(before, other) != getattr(after, other)
        assert np.all(changed.reshape(40, -1).any(1))


def test_a_maze_by_hand():
    maze = mazes.t_maze()
    long = jnp.int32(2)
    for sign, right in ((0, mazes.LEFT), (1, mazes.RIGHT)):
        state = mazes.Walk(jnp.int32(sign), jnp.int32(0))
        seen, state, reward, done, _ = maze.step(None, state, jnp.int32(mazes.LEFT), long)
        assert (float(reward), bool(done), int(state.place)) == (np.float32(-0.1), False, 0)
        assert seen.argmax() == sign
        seen, state, reward, done, _ = maze.step(None, state, jnp.int32(mazes.FORWARD), long)
        assert (float(reward), bool(done), int(seen.argmax())) == (0, False, 2)
        seen, state, *_ = maze.step(None, state, jnp.int32(mazes.FORWARD), long)
        assert seen.argmax() == 3
        assert maze.step(None, state, jnp.int32(mazes.FORWARD), long)[2] == np.float32(-0.1)
        for turn in (mazes.LEFT, mazes.RIGHT):
            _, _, reward, done, _ = maze.step(None, state, jnp.int32(turn), long)
            assert (float(reward), bool(done)) == (1 if turn == right else -1, True)
    assert maze.best(long) == pytest.approx(1 / 3)


def test_signs_are_drawn_and_lengths_too(key):
    world = mazes.walks("t-maze", mazes.t_maze, (2, 4), 9)
    lives = jax.vmap(lambda key: environments.begin(world, key))(jax.random.split(key, 60))
    assert set(lives.before.tolist()) == {2, 3, 4}
    assert set(lives.state.sign.tolist()) == {0, 1}


def test_cart_pole_obeys_the_equations_of_motion(x64):
    """Of Lagrange: M x'' + m l (t'' cos - t'^2 sin) = F;  x'' cos + 4/3 l t'' = g sin."""
    pole = cartpole.cart_pole()
    state, physics = jnp.array([0.3, -0.4, 0.1, 0.7]), cartpole.Physics(9.8, 0.6, 12.0)
    for action, force in ((0, -12.0), (1, 12.0)):
        _, after, reward, done, _ = pole.step(None, state, action, physics)
        change = (after - state) / cartpole.SECONDS
        np.testing.assert_allclose(change[jnp.array([0, 2])], state[jnp.array([1, 3])])
        pull, spin = change[1], change[3]
        sine, cosine = np.sin(0.1), np.cos(0.1)
        balance = 1.1 * pull + 0.1 * 0.6 * (spin * cosine - 0.7**2 * sine)
        np.testing.assert_allclose(balance, force)
        np.testing.assert_allclose(pull * cosine + 4 / 3 * 0.6 * spin, 9.8 * sine)
        assert (float(reward), bool(done)) == (0, False)
    for fallen in ([2.5, 0, 0, 0], [-2.5, 0, 0, 0], [0, 0, 0.22, 0], [0, 0, -0.22, 0]):
        *_, reward, done, _ = pole.step(None, jnp.array(fallen), 0, physics)
        assert (float(reward), bool(done)) == (-1, True)


def test_actions_of_cart_pole_are_reversed_at_the_switch(key):
    draw = cartpole.switching_physics(10, (5, 5)).draw
    before, after = jax.vmap(draw)(jax.random.split(key, 40))
    assert np.all(before.force * after.force < 0)
    assert len(set(np.sign(before.force).tolist())) == 2
    for drawn in (before, after):
        assert np.all((drawn.gravity >= 7) & (drawn.gravity <= 13))
        assert np.all((drawn.half >= 0.3) & (drawn.half <= 0.8))
        assert np.all((abs(drawn.force) >= 8) & (abs(drawn.force) <= 14))
    assert np.ptp(before.gravity - after.gravity) > 0


def test_padding_changes_sizes_alone(key):
    small = mazes.memory_chain()
    large = environments.padded(small, 5, 7, 3)
    assert (large.actions, large.observation) == (5, 7)
    (seen, state), (longer, same) = (e.reset(key, jnp.int32(1)) for e in (small, large))
    assert longer.tolist() == [0, 0, 0, *seen.tolist(), 0, 0]
    assert same == state
    state = state._replace(place=jnp.int32(1))
    for action in range(5):
        own = small.step(key, state, action % 2, jnp.int32(1))
        other = large.step(key, state, action, jnp.int32(1))
        assert own[2] == other[2]
        assert other[0].shape == (7,)
    for sizes in ((1, 7, 0), (5, 7, 6), (5, 1, 0)):
        with pytest.raises(ValueError, match="must have room for the environment's own 2 and 2"):
            environments.padded(small, *sizes)


def test_refusals_are_sentences(key):
    with pytest.raises(ValueError, match="`arms` is 1; it must be an integer >= 2"):
        bandits.switching_bandit(1, 10, (5, 5))
    with pytest.raises(ValueError, match="`arms` is 1; it must be an integer >= 2"):
        bandits.switching_contexts((1, 3), 1, 10, (5, 5))
    with pytest.raises(ValueError, match=r"`contexts` is \(3, 2\); it must be the least, >= 1"):
        bandits.switching_contexts((3, 2), 2, 10, (5, 5))
    with pytest.raises(ValueError, match="`size` is 4; it must be an odd integer >= 3"):
        gridworld.gridworld(4)
    with pytest.raises(ValueError, match=r"`lengths` is \(3, 2\); it must be two integers >= 1"):
        mazes.walks("t-maze", mazes.t_maze, (3, 2), 10)
    world = WORLDS["bandit"]
    with pytest.raises(ValueError, match=r"`switch` is \(4, 12\); it must be two steps of a life"):
        environments.begin(world._replace(switch=(4, 12)), key)
    with pytest.raises(ValueError, match="`length` is 0; it must be an integer >= 1"):
        environments.begin(world._replace(length=0, switch=None), key)


class Counter:
    """Shaped as gymnax's environments: counts to a limit, and is cut off after three steps."""

    def reset_env(self, key, params):
        return jnp.zeros((2, 2), jnp.int32), jnp.int32(0)

    def step_env(self, key, state, action, params):
        after = state + action
        return jnp.full((2, 2), after), after, 1.0 * action, after >= params["limit"], {"a": 1}

    def is_truncated(self, state, params):
        return state == 3

    def action_space(self, params):
        return types.SimpleNamespace(n=2)

    def observation_space(self, params):
        return types.SimpleNamespace(shape=(2, 2))


def _gymnax(monkeypatch, environment):
    fake = types.SimpleNamespace(
        registered_envs=["Counter-v0"], make=lambda name: (environment, {"limit": 5})
    )
    monkeypatch.setitem(sys.modules, "gymnax", fake)


def test_environments_of_gymnax_are_lived_in(monkeypatch, key):
    _gymnax(monkeypatch, Counter())
    made = environments.from_gymnax("Counter-v0")
    assert (made.actions, made.observation, made.best) == (2, 4, None)
    world = World("counter", made, environments.constant(made, {"limit": jnp.int32(2)}), 6)
    lives, outcomes = lived(world, key, [1, 0, 1, 1, 1])
    assert [bool(o.done) for o in outcomes] == [False, False, True, False, True]
    assert [life.percept[0].item() for life in lives] == [0, 1, 1, 0, 1, 0]
    assert np.isnan(outcomes[0].regret)
    longer = World("counter", made, environments.constant(made), 6)  # its own limit of 5
    assert [bool(o.done) for o in lived(longer, key, [1] * 4)[1]] == [False, False, True, False]
    with pytest.raises(ValueError, match="`name` is 'Count'; it must be one of Counter-v0"):
        environments.from_gymnax("Count")


def test_gymnax_is_refused_where_it_is_missing_or_its_actions_are_no_integers(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(Refused, match=r'not installed: pip install "nlx\[gymnax\]"'):
        environments.from_gymnax("CartPole-v1")
    continuous = Counter()
    continuous.action_space = lambda params: types.SimpleNamespace(shape=(1,))
    _gymnax(monkeypatch, continuous)
    with pytest.raises(ValueError, match="whose actions are no integers"):
        environments.from_gymnax("Counter-v0")
