"""What the algorithms promise as modules, and that they learn."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fastmeta.algorithms import MAML, ProtoNet
from fastmeta.nn import conv4, mlp
from fastmeta.tasks import TaskBatch


def class_batch(tasks=4, shots=2, queries=3, ways=3, width=5, spread=0.3, seed=0):
    """Every task has its own cluster centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(tasks, ways, 1, width, generator=generator)

    def rows(count):
        x = centres + spread * torch.randn(tasks, ways, count, width, generator=generator)
        return x.flatten(1, 2), torch.arange(ways).repeat_interleave(count).expand(tasks, -1).contiguous()

    return TaskBatch(*rows(shots), *rows(queries))


def sinusoids(tasks, shots, generator):
    """y = A sin(x - phase), as in Finn et al. 2017, section 5.1."""
    amplitude = torch.rand(tasks, 1, 1, generator=generator) * 4.9 + 0.1
    phase = torch.rand(tasks, 1, 1, generator=generator) * math.pi
    x = torch.rand(tasks, 2 * shots, 1, generator=generator) * 10 - 5
    y = amplitude * torch.sin(x - phase)
    return TaskBatch(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])


class TestMAML:
    def maml(self, **options):
        torch.manual_seed(0)
        return MAML(mlp([5, 8, 3]), **({"inner_lr": 0.1, "inner_steps": 2} | options))

    @pytest.mark.parametrize("engine", ["auto", "layerwise", "vmap"])
    def test_adapt_and_predict_are_forward(self, engine):
        maml, batch = self.maml(engine=engine), class_batch()
        state = maml.adapt(batch.support_x, batch.support_y)
        logits = maml.predict(state, batch.query_x)
        output = maml(batch)
        torch.testing.assert_close(output.logits, logits)
        torch.testing.assert_close(output.task_loss[1], F.cross_entropy(logits[1], batch.query_y[1]))
        torch.testing.assert_close(output.loss, output.task_loss.mean())
        torch.testing.assert_close(output.accuracy, (logits.argmax(-1) == batch.query_y).float().mean(1))

    @pytest.mark.parametrize("steps", [0, 2])
    @pytest.mark.parametrize("engine", ["auto", "vmap"])
    def test_state_holds_each_tasks_weights(self, engine, steps):
        maml, batch = self.maml(engine=engine, inner_steps=steps), class_batch()
        state = maml.adapt(batch.support_x, batch.support_y)
        assert len(state) == 4 and [p.shape for p in state.stacked().values()] == [
            (4, *p.shape) for p in maml.model.parameters()
        ]
        logits = maml.predict(state, batch.query_x)
        for task in (0, -1):
            torch.testing.assert_close(functional_call(maml.model, state[task], (batch.query_x[task],)), logits[task])
        with pytest.raises(IndexError):
            state[4]
        assert "4 tasks" in repr(state)

    @pytest.mark.parametrize("engine", ["fused", "lowrank", "layerwise", "vmap"])
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_adapts_without_gradients(self, engine, mode):
        maml, batch = self.maml(engine=engine), class_batch()
        expected = maml(batch)
        with mode():
            output = maml(batch)
            state = maml.adapt(batch.support_x, batch.support_y)
        assert not output.loss.requires_grad and not any(w.requires_grad for w in state.stacked().values())
        torch.testing.assert_close(output.logits, expected.logits.detach())
        chunked = self.maml(engine=engine, task_chunk=3)
        with mode():
            torch.testing.assert_close(chunked(batch).logits, output.logits)

    def test_copies_saves_and_loads(self):
        maml, batch = self.maml(), class_batch()
        expected = maml(batch).loss
        clone = copy.deepcopy(maml)
        clone(batch).loss.backward()
        assert all(p.grad is None for p in maml.parameters())
        other = MAML(mlp([5, 8, 3]), inner_lr=0.1, inner_steps=2)
        assert list(maml.state_dict()) == [f"model.{name}" for name in maml.model.state_dict()]
        other.load_state_dict(maml.state_dict())
        torch.testing.assert_close(other(batch).loss, expected)
        torch.testing.assert_close(clone(batch).loss, expected)

    def test_arguments_are_checked(self):
        model, batch = mlp([5, 8, 3]), class_batch()
        with pytest.raises(ValueError, match="inner_steps"):
            MAML(model, inner_steps=-1)
        with pytest.raises(TypeError, match="inner_lr"):
            MAML(model, inner_lr="fast")
        with pytest.raises(ValueError, match="inner_lr"):
            MAML(model, inner_lr=float("nan"))
        with pytest.raises(ValueError, match="loss must be"):
            MAML(model, loss="hinge")
        with pytest.raises(ValueError, match="task_chunk"):
            MAML(model, task_chunk=0)
        with pytest.raises(ValueError, match="support_x and support_y"):
            MAML(model)(batch._replace(support_y=batch.support_y[:, :-1]))
        with pytest.raises(ValueError, match="query_y: cross_entropy"):
            MAML(model)(batch._replace(query_y=batch.query_y.int()))
        for engine in ("lowrank", "vmap"):
            for label in (-100, 3):
                wrong = batch.support_y.clone().index_fill_(1, torch.tensor([0]), label)
                with pytest.raises((ValueError, RuntimeError), match=f"{label}"):
                    MAML(model, engine=engine)(batch._replace(support_y=wrong))
                wrong = batch.query_y.clone().index_fill_(1, torch.tensor([0]), label)
                with pytest.raises(ValueError, match=f"query_y.*{label}"):
                    MAML(model, engine=engine)(batch._replace(query_y=wrong))
            with pytest.raises(ValueError, match="support_y: mse"):
                MAML(model, loss="mse", engine=engine)(batch)
        with pytest.raises(ValueError, match="tasks"):
            MAML(model)(batch._replace(query_x=batch.query_x[:2], query_y=batch.query_y[:2]))

    @pytest.mark.learning
    def test_learns_sinusoids(self):
        """Adapting must beat both the net that was not adapted and one trained on all tasks together."""

        def train(steps):
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(1)
            maml = MAML(mlp([1, 40, 40, 1], "tanh"), inner_lr=0.05, inner_steps=steps, loss="mse")
            optimizer = torch.optim.Adam(maml.parameters())
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=2000, pct_start=0.1)
            for _ in range(2000):
                optimizer.zero_grad()
                maml(sinusoids(25, 10, generator)).loss.backward()
                optimizer.step()
                schedule.step()
            return maml

        @torch.no_grad()
        def loss(maml, steps):
            maml.inner_steps = steps
            return maml(sinusoids(500, 10, torch.Generator().manual_seed(2))).loss.item()

        maml, joint = train(1), train(0)
        adapted = loss(maml, 1)
        assert adapted < loss(maml, 0) / 5
        assert adapted < loss(joint, 0) / 5 and adapted < loss(joint, 1) / 5


class TestProtoNet:
    def test_forward_is_the_formula(self):
        torch.manual_seed(0)
        net, batch = ProtoNet(mlp([5, 8, 4])), class_batch()
        support, query = net.encoder(batch.support_x.flatten(0, 1)), net.encoder(batch.query_x.flatten(0, 1))
        support, query = support.unflatten(0, (4, -1)), query.unflatten(0, (4, -1))
        prototypes = torch.stack([support[:, i * 2 : i * 2 + 2].mean(1) for i in range(3)], 1)
        logits = -(query.unsqueeze(2) - prototypes.unsqueeze(1)).square().sum(-1)
        output = net(batch)
        torch.testing.assert_close(output.loss, F.cross_entropy(logits.flatten(0, 1), batch.query_y.flatten()))
        torch.testing.assert_close(output.accuracy, (logits.argmax(-1) == batch.query_y).float().mean(1))
        state = net.adapt(batch.support_x, batch.support_y)
        torch.testing.assert_close(state.prototypes, prototypes)
        torch.testing.assert_close(net.predict(state, batch.query_x), logits)

    @pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine", "dot", "manhattan"])
    def test_metrics(self, metric):
        net, batch = ProtoNet(mlp([5, 8, 4]), metric=metric, ways=3), class_batch()
        output = net(batch)
        logits = net.predict(net.adapt(batch.support_x, batch.support_y), batch.query_x)
        torch.testing.assert_close(output.loss, F.cross_entropy(logits.flatten(0, 1), batch.query_y.flatten()))

    def test_examples_may_be_numbers(self):
        """What `nn.Embedding` takes: an example without dimensions. Floating ones lack their tasks or features."""
        net, ids = ProtoNet(nn.Embedding(12, 4)), torch.arange(12).view(2, 6)
        labels = torch.arange(2).repeat(2, 3)
        output = net(TaskBatch(ids[:, :4], labels[:, :4], ids[:, 4:], labels[:, 4:]))
        prototypes = net.encoder.weight.view(2, 3, 2, 4)[:, :2].mean(1)
        logits = -(net.encoder.weight.view(2, 6, 1, 4)[:, 4:] - prototypes.unsqueeze(1)).square().sum(-1)
        torch.testing.assert_close(output.loss, F.cross_entropy(logits.flatten(0, 1), labels[:, 4:].flatten()))
        with pytest.raises(ValueError, match=r"support_x must have shape \[T, B, ...\], got \[4, 5\]"):
            net.adapt(torch.randn(4, 5), labels)

    def test_evaluation_is_not_transductive(self):
        torch.manual_seed(0)
        net = ProtoNet(conv4(hidden=4))
        x, y = torch.randn(2, 4, 1, 16, 16), torch.arange(2).repeat(2).expand(2, 4)
        net(TaskBatch(x, y, x, y))  # updates the running statistics
        net.eval()
        state = net.adapt(x, y)
        alone = torch.cat([net.predict(state, x[:, i : i + 1]) for i in range(4)], 1)
        torch.testing.assert_close(alone, net.predict(state, x), rtol=1e-4, atol=1e-5)

    def test_arguments_are_checked(self):
        batch = class_batch()
        with pytest.raises(ValueError, match="ways"):
            ProtoNet(nn.Identity(), ways=0)
        with pytest.raises(ValueError, match="metric"):
            ProtoNet(nn.Identity(), metric="nearest")(batch)
        with pytest.raises(ValueError, match="encoder"):
            ProtoNet(nn.Unflatten(1, (5, 1)))(batch)
        with pytest.raises(ValueError, match="support_y.*ways = 2"):
            ProtoNet(nn.Identity(), ways=2)(batch)

    @pytest.mark.learning
    def test_learns_which_directions_matter(self):
        """Classes differ in two of twenty columns; the others are noise that an encoder must learn to
        drop."""
        torch.manual_seed(0)
        net = ProtoNet(mlp([20, 32, 8]), ways=5)

        def batch(seed):
            batch = class_batch(16, 1, 5, 5, 20, 0.0, seed)
            signal = torch.zeros(20).index_fill_(0, torch.tensor([3, 11]), 1.0)
            noise = torch.Generator().manual_seed(seed + 1)
            support, query = (
                x * signal + torch.randn(x.shape, generator=noise) * (1.5 * (1 - signal) + 0.05)
                for x in (batch.support_x, batch.query_x)
            )
            return batch._replace(support_x=support, query_x=query)

        with torch.no_grad():
            before = sum(net(batch(s)).accuracy.mean().item() for s in range(10**6, 10**6 + 10)) / 10
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for step in range(200):
            optimizer.zero_grad()
            net(batch(step * 2)).loss.backward()
            optimizer.step()
        with torch.no_grad():
            after = sum(net(batch(s)).accuracy.mean().item() for s in range(10**6, 10**6 + 10)) / 10
        assert before < 0.5 and after > 0.75


def test_constructors_check_their_arguments():
    assert conv4()(torch.randn(2, 1, 28, 28)).shape == (2, 64)
    assert conv4(3, 8)(torch.randn(2, 3, 84, 84)).shape == (2, 200)
    with pytest.raises(ValueError, match="sizes"):
        mlp([3])
    with pytest.raises(ValueError, match="activation"):
        mlp([3, 2], "swish")
