"""Personalised regression: a patient's score from a few labelled rows of the patient's own.

Tasks are patients of the Oxford Parkinson's telemonitoring data (Tsanas et al. 2009), inputs 16 measures of voice, age,
sex and time, the target the total UPDRS score. Held-out patients give `--shots` labelled rows each. Compared: a model
pooled over all training patients, a ridge regression on each patient's rows alone, their mean, and two learners.

    python examples/personalised_regression.py --data FOLDER/parkinsons_updrs.data
"""

import argparse

import torch

from fastmeta.algorithms import MAML, RidgeHead
from fastmeta.nn import mlp
from fastmeta.tasks import RegressionTasks
from fastmeta.tasks.read import table


def ridge(x, y, strength):
    """Weights `[..., D + 1, O]` of rows `[..., R, D]`, the last for the intercept, which is not shrunk."""
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    penalty = strength * torch.eye(x.shape[-1])
    penalty[-1, -1] = 1e-6
    return torch.linalg.solve(x.mT @ x + penalty, x.mT @ y)


def apply(weights, x):
    return x @ weights[..., :-1, :] + weights[..., -1:, :]


def train(learner, tasks, steps, seed):
    optimizer = torch.optim.Adam(learner.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        learner(tasks.sample(16, generator=generator)).loss.backward()
        optimizer.step()
    return learner.eval()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    splits, _, targets = table(args.data, task="subject#", target="total_UPDRS", ignore=("motor_UPDRS",))
    train_tasks, test_tasks = (RegressionTasks(part, shots=args.shots) for part in (splits.train, splits.test))
    width, scale = train_tasks.input_shape[0], float(targets.scale[0])
    maml = MAML(mlp([width, 64, 64, 1]), inner_lr=0.02, inner_steps=5, clip_norm=1.0, loss="mse")
    learned = {
        "MAML": train(maml, train_tasks, args.steps, args.seed),
        "ridge on learned features": train(
            RidgeHead(mlp([width, 64, 32]), loss="mse"), train_tasks, args.steps, args.seed
        ),
    }
    batch = test_tasks.sample(400, generator=torch.Generator().manual_seed(1))
    pooled = ridge(splits.train.rows[splits.train.by_task.order], splits.train.targets[splits.train.by_task.order], 1.0)
    found = {
        "pooled ridge": apply(pooled, batch.query_x),
        "mean of the patient's rows": batch.support_y.mean(1, keepdim=True).expand_as(batch.query_y),
        "ridge on the patient's rows": apply(ridge(batch.support_x, batch.support_y, 10.0), batch.query_x),
    }
    with torch.no_grad():
        for name, learner in learned.items():
            found[name] = learner(batch).logits
    print(f"{len(splits.test)} held-out patients, {args.shots} labelled rows each: mean error in points of the score")
    errors = {name: scale * (predicted - batch.query_y).abs().mean((1, 2)) for name, predicted in found.items()}
    for name, error in errors.items():
        print(f"{name:30s} {error.mean():6.2f} ± {1.96 * error.std() / len(error) ** 0.5:.2f}")
    return {name: float(error.mean()) for name, error in errors.items()}


if __name__ == "__main__":
    main()
