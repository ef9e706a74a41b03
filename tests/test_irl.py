"""Inverse reinforcement learning: the loss against exact enumeration, planning against its equations, the worlds, and
that meta-learning pays."""

import itertools
import math

import pytest
import torch
from conftest import DEVICE

from fastmeta import MAML
from fastmeta.dispatch import backends
from fastmeta.irl import GridworldTasks, MaxEntLoss, PointMassTasks, TabularMaxEntLoss
from fastmeta.irl.experiment import experiment, judge, reward_network, train
from fastmeta.irl.maxent import rows, visits
from fastmeta.irl.planning import best_moves, soft_policy, value_of, value_of_chance, walk

WORLDS = {
    "gridworld": lambda **options: GridworldTasks(**({"size": 4, "samples": 6, "device": DEVICE} | options)),
    "pointmass": lambda **options: PointMassTasks(**({"samples": 6, "candidates": 32, "device": DEVICE} | options)),
}


def generator(seed=0):
    return torch.Generator(DEVICE).manual_seed(seed)


def line(cells=3):
    """A corridor in which one moves left or right."""
    at = torch.arange(cells, device=DEVICE)
    return torch.stack([(at - 1).clamp_min(0), (at + 1).clamp_max(cells - 1)], 1)


def all_walks(next, start, horizon):
    found = []
    for moves in itertools.product(range(next.shape[1]), repeat=horizon):
        cell, visited = start, []
        for move in moves:
            cell = int(next[cell, move])
            visited.append(cell)
        found.append(visited)
    return torch.tensor(found, device=DEVICE)


def test_soft_policy_is_maximum_entropy():
    next, horizon = line(), 4
    rewards = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64, device=DEVICE)
    policy = soft_policy(rewards, next, horizon)
    walks = all_walks(next, 1, horizon)
    expected = torch.log_softmax(rewards[0][walks].sum(1), 0)
    for index, moves in enumerate(itertools.product(range(2), repeat=horizon)):
        cell, log_p = 1, 0.0
        for time, move in enumerate(moves):
            log_p += float(policy[0, time, cell, move])
            cell = int(next[cell, move])
        assert log_p == pytest.approx(float(expected[index]))


def test_values_of_policies():
    next, horizon = line(), 3
    rewards = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.0, -1.0]], dtype=torch.float64, device=DEVICE)
    best, chance = best_moves(rewards, next, horizon), value_of_chance(rewards, next, horizon)
    value = value_of(best, rewards, next)
    for task, cell in itertools.product(range(2), range(3)):
        returns = rewards[task][all_walks(next, cell, horizon)].sum(1)
        assert float(value[task, cell]) == pytest.approx(float(returns.max()))
        assert float(chance[task, cell]) == pytest.approx(float(returns.mean()))


def exact_loss(rewards, next, start, demonstration, horizon):
    returns = rewards[all_walks(next, start, horizon)].sum(1)
    return returns.logsumexp(0) - rewards[demonstration].sum()


@pytest.mark.parametrize("tabular", [True, False])
def test_loss_is_exact_when_every_trajectory_is_a_sample(tabular):
    next, horizon = line(), 4
    walks = all_walks(next, 1, horizon)
    count = len(walks)
    rewards = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, device=DEVICE, requires_grad=True)
    demonstration = walks[5]
    log_q = torch.full((1, 1, count), -math.log(count), dtype=torch.float64, device=DEVICE)
    if tabular:
        targets = visits(3, demonstration.view(1, 1, horizon), walks.view(1, 1, count, horizon), log_q)
        given = torch.cat([rewards, rewards.new_tensor([123.0])])[:, None]  # the last row's reward means nothing
        found = TabularMaxEntLoss(count)(given, targets[0])
    else:
        features = torch.arange(3.0, dtype=torch.float64, device=DEVICE)[:, None]
        x, targets = rows(features[demonstration][None, None], features[walks][None, None], log_q)
        found = MaxEntLoss(count, horizon)(rewards[x[0, :, 0].long()][:, None], targets[0])
    expected = exact_loss(rewards, next, 1, demonstration, horizon)
    torch.testing.assert_close(found, expected)
    # expected visits of the model less those of the demonstrator
    p = torch.softmax(rewards.detach()[walks].sum(1), 0)
    model = torch.stack([(p * (walks == c).sum(1)).sum() for c in range(3)])
    shown = torch.stack([(demonstration == c).sum() for c in range(3)])
    torch.testing.assert_close(torch.autograd.grad(found, rewards)[0], model - shown)


def test_importance_samples_converge_to_the_partition_function():
    tasks = GridworldTasks(size=2, colours=3, distractors=0, horizon=3, samples=20000, device=DEVICE)
    worlds = tasks.worlds(3, generator=generator())
    x, y = tasks.demonstrate(worlds, 1, generator=generator(1))
    truth = torch.cat([worlds.rewards, worlds.rewards.new_zeros(3, 1)], 1)
    for task in range(3):
        shown = y[task, :-1, 0]
        starts = []
        for start in range(4):  # the start is not in the targets: the samples tell which it was
            returns = worlds.rewards[task][all_walks(tasks.next, start, 3)].sum(1)
            starts.append(float(returns.logsumexp(0) - (worlds.rewards[task] * shown).sum()))
        found = float(tasks.loss(truth[task][:, None], y[task]))
        assert min(abs(found - s) for s in starts) < 0.05, (found, starts)


def test_point_mass_weights_are_densities():
    tasks = PointMassTasks(samples=4000, device=DEVICE)
    actions = tasks._passive(torch.zeros(1, 2, device=DEVICE), 50000, 1.0, generator())[1]
    time = torch.ones(8, 8, device=DEVICE) * tasks.velocity**2 + tasks.noise**2 * torch.eye(8, device=DEVICE)
    normal = torch.distributions.MultivariateNormal(torch.zeros(8, device=DEVICE), time)
    expected = normal.log_prob(actions[0, :10, :, 0]) + normal.log_prob(actions[0, :10, :, 1])
    torch.testing.assert_close(tasks._log_density(actions, 1.0)[0, :10], expected, rtol=1e-3, atol=1e-3)
    # with weights q0 / q a mean over samples of q is one over q0: of 1, it is 1
    wide = tasks._passive(torch.zeros(1, 2, device=DEVICE), 200000, 2.0, generator())[1]
    ratio = tasks._log_density(wide, 1.0) - tasks._log_density(wide, 2.0)
    assert float(ratio.exp().mean()) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("name", WORLDS)
def test_tasks_are_ordinary_and_repeat(name):
    tasks = WORLDS[name](demonstrations=3)
    batch, again = (tasks.sample(4, generator=generator(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    assert batch.support_x.shape[:2] == batch.support_y.shape[:2] and batch.support_x.shape[2:] == tasks.input_shape
    assert not torch.equal(batch.support_y, batch.query_y)
    learner = MAML(reward_network(tasks), loss=tasks.loss, inner_steps=1, inner_lr=0.1).to(DEVICE)
    output = learner(batch)
    assert output.task_loss.shape == (4,) and output.loss.isfinite()
    output.loss.backward()
    more = tasks.demonstrate(tasks.worlds(2), 10)
    assert len(learner.adapt(*more)) == 2


@pytest.mark.parametrize("name", WORLDS)
def test_rewards_adapt_in_the_fused_inner_loops(name):
    tasks = WORLDS[name](demonstrations=2, samples=3)
    batch = tasks.sample(3, generator=generator())
    batch = type(batch)(*(t.double() for t in batch))
    network = reward_network(tasks).to(DEVICE).double()
    found = {}
    for engine in ("fused", "vmap"):
        learner = MAML(network, loss=tasks.loss, inner_steps=3, inner_lr=0.05, engine=engine)
        output = learner(batch)
        state = learner.adapt(*batch[:2])
        gradients = torch.autograd.grad(output.loss, list(network.parameters()))
        predicted = learner.predict(state, batch.query_x)
        found[engine] = [output.task_loss, output.logits, predicted, *state.stacked().values(), *gradients]
    for fused, vmapped in zip(*found.values(), strict=True):
        torch.testing.assert_close(fused, vmapped, rtol=1e-9, atol=1e-9)
    if DEVICE == "cpu" and backends.why_missing("cpp", DEVICE) is None:
        assert "fused: picked" in MAML(network, loss=tasks.loss, inner_lr=0.1).explain(batch)


@pytest.mark.parametrize("name", WORLDS)
def test_value_difference_of_truth_and_of_chance(name):
    tasks = WORLDS[name]()
    worlds = tasks.worlds(60, generator=generator())
    states = tasks.states(worlds, generator=generator(1))
    true = worlds.rewards if name == "gridworld" else tasks.true_rewards(worlds, states)
    zero = tasks.value_difference(worlds, true.unsqueeze(-1), states)
    torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-5)
    noise = torch.randn(true.shape, generator=generator(2), device=DEVICE)
    assert 0.7 < float(tasks.value_difference(worlds, noise.unsqueeze(-1), states).mean()) < 1.3
    worse = tasks.value_difference(worlds, -true.unsqueeze(-1), states)
    assert float(worse.mean()) > 1.3


def test_walks_follow_their_policy():
    next = line()
    never_left = torch.tensor([-math.inf, 0.0], device=DEVICE)
    start = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
    moves, cells = walk(lambda time, cell: never_left.expand(*cell.shape, 2), next, start, 4)
    assert (moves == 1).all() and cells[0, 0].tolist() == [1, 2, 2, 2]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        MaxEntLoss(0, 3)
    with pytest.raises(ValueError, match="colours must be at least 3, got 2"):
        GridworldTasks(colours=2)
    with pytest.raises(ValueError, match="world must be one of gridworld, pointmass; got 'maze'"):
        experiment("maze")


@pytest.mark.learning
def test_meta_learned_rewards_beat_averaged_and_scratch():
    tasks = GridworldTasks(size=5, device=DEVICE)
    meta = train(tasks, inner_steps=1, iterations=250)
    averaged = train(tasks, inner_steps=0, iterations=100)
    averaged.inner_steps = 1
    torch.manual_seed(3)
    scratch = MAML(reward_network(tasks), loss=tasks.loss, inner_steps=1, inner_lr=0.3).to(DEVICE)
    found = {name: judge(learner, tasks, 5, num_tasks=50).mean
             for name, learner in (("meta", meta), ("averaged", averaged), ("scratch", scratch))}  # fmt: skip
    assert found["meta"] < 0.12 and found["meta"] < 0.6 * min(found["averaged"], found["scratch"]), found
