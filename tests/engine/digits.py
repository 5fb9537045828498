"""A user's own file: a torch model of handwritten digits (is it even?), its data, loss and AUC."""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels % 2 == 0).float()
shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
x, y = x[shuffled], y[shuffled]
batches = list(zip(x[:1200].split(100), y[:1200].split(100), strict=True))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 96)
        self.last = nn.Linear(96, 1)

    def forward(self, x):
        return self.last(F.relu(self.second(F.relu(self.first(x))))).squeeze(-1)


def loss(outputs, batch):
    return F.binary_cross_entropy_with_logits(outputs, batch[1], reduction="none")


def metrics(model):
    return {"auc": roc_auc_score(y[1200:], model(x[1200:]))}


def trained():
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for batch in 4 * batches:
        optimizer.zero_grad()
        loss(net(batch[0]), batch).mean().backward()
        optimizer.step()
    return net.eval()


def compressed(net, output, progress=None):
    import rankine

    return rankine.compress(
        net,
        method="anchored_svd",
        bits=6.0,
        calibration=batches,
        loss=loss,
        evaluate=metrics,
        output=output,
        progress=progress,
    )


if __name__ == "__main__":  # digits.py OUTPUT [STAGE DONE]: dies there
    import os
    import signal

    def die(stage, done, total):
        if [stage, str(done)] == sys.argv[2:]:
            os.kill(os.getpid(), signal.SIGKILL)

    compressed(trained(), sys.argv[1], die)
