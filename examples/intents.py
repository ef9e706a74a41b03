"""Few-shot intents: CLINC150's queries as bags of words, on intents that were never trained on.

    python examples/intents.py --data FOLDER/clinc150
"""

import argparse

import torch
from torch import nn

from fastmeta.algorithms import NearestNeighbour, ProtoNet
from fastmeta.nn import mlp
from fastmeta.tasks import EpisodeSampler, clinc
from fastmeta.training import Trainer, evaluate


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--words", type=int, default=2000)
    parser.add_argument("--episodes", type=int, default=600)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    train = EpisodeSampler(clinc("train", args.data, words=args.words), ways=20, shots=1, query_shots=5)
    test = EpisodeSampler(clinc("test", args.data, words=args.words), ways=5, shots=1, query_shots=15)
    encoder = nn.Sequential(nn.Dropout(0.3), mlp([train.input_shape[0], 256, 128]))
    learner = ProtoNet(encoder)
    Trainer(learner, train, task_batch=4, iterations=args.steps, lr_schedule="cosine", outer_lr=2e-3).run()
    found = {}
    for name, one in (("nearest words", NearestNeighbour(nn.Flatten(), normalise=True)), ("ProtoNet", learner)):
        accuracy = evaluate(one, test, episodes=args.episodes).accuracy
        found[name] = accuracy.mean
        print(f"{name:14s} {100 * accuracy.mean:.1f} ± {100 * accuracy.ci95:.1f} %, 5-way 1-shot, held-out intents")
    return found


if __name__ == "__main__":
    main()
