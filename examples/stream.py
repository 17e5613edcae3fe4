"""A stream that changes without notice: an LSTM that keeps what it knew of sequences of different lengths.

python examples/stream.py
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mas_ext import FusedMASPenalty, TaskFree

WAVES = (0.3, 0.9, 1.5)  # of the three sensors, radians per sample; one after another they are on


class Predictor(nn.Module):
    """The next value of each sequence, from a batch padded at its end, (N, T, 3), and lengths, (N,)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 32, batch_first=True)
        self.last = nn.Linear(32, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        ends = self.lstm(x)[0][torch.arange(len(x)), lengths - 1]  # before the padding
        return self.last(ends)[:, 0]


def sequences(sensor: int, count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """10 to 20 samples of a wave that begins anywhere: padded, their lengths, and what comes next."""
    lengths = torch.randint(10, 21, (count,), generator=random)
    first = 6.3 * torch.rand(count, generator=random)
    each = [(first[i] + WAVES[sensor] * torch.arange(n + 1)).sin() for i, n in enumerate(lengths)]
    x = torch.zeros(count, int(lengths.max()), len(WAVES))
    x[:, :, sensor] = pad_sequence([wave[:-1] for wave in each], batch_first=True)
    return x, lengths, torch.stack([wave[-1] for wave in each])


def learn(lam: float, steps: int = 400) -> list[float]:
    """The mean squared error for each sensor after the last one."""
    torch.manual_seed(0)
    random, model = torch.Generator().manual_seed(1), Predictor()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    penalty = FusedMASPenalty(model, lam, forward=lambda model, batch: model(*batch))
    penalty.attach(optimizer, mode="proximal")
    watcher = TaskFree(penalty)
    for step in range(len(WAVES) * steps):
        x, lengths, y = sequences(step // steps, 32, random)
        losses = (model(x, lengths) - y).square()
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        if plateau := watcher.step(losses, (x, lengths)):
            print(f"step {plateau.step}: {plateau.reason}")
    tests = [sequences(sensor, 500, random) for sensor in (0, 1, 2)]
    return [(model(x, lengths) - y).square().mean().item() for x, lengths, y in tests]


if __name__ == "__main__":
    for lam in (0.0, 10.0):
        print(f"lam {lam:g}, mean squared errors:", *(f"{each:.4f}" for each in learn(lam)))
