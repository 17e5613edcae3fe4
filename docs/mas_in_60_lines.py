"""Memory Aware Synapses (Aljundi et al., ECCV 2018) and MAS-alpha in plain PyTorch: the whole method."""

import torch
from torch import nn


def importance(model, samples):
    """Omega_i = 1/N sum_k abs(d |F(x_k)|^2 / d theta_i): how much the output depends on each parameter."""
    theta = dict(model.named_parameters())
    omega = {name: torch.zeros_like(p) for name, p in theta.items()}
    for x in samples:  # One at a time: in a batch, gradients would cancel before abs.
        gradients = torch.autograd.grad(model(x[None]).square().sum(), list(theta.values()))
        for name, g in zip(theta, gradients, strict=True):
            omega[name] += g.abs() / len(samples)
    return omega


class MAS:
    """Holds the parameters that are important to earlier tasks where the last of them ended."""

    def __init__(self, model, lam):
        self.model, self.lam, self.tasks = model, lam, []

    def consolidate(self, samples):
        """The end of a task: its importance, from samples without labels, and where training ended."""
        anchor = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.tasks.append((importance(self.model, samples), anchor))

    def terms(self):
        """alpha_t, Omega_t and theta*_t of every task: alpha_t = lam, theta*_t that of the last task."""
        return [(self.lam, omega, self.tasks[-1][1]) for omega, _ in self.tasks]

    def penalty(self):
        """sum_t alpha_t sum_i Omega_t,i (theta_i - theta*_t,i)^2: 0 during the first task."""
        value = torch.zeros(())
        for alpha, omega, anchor in self.terms():
            for name, p in self.model.named_parameters():
                value = value + alpha * (omega[name] * (p - anchor[name]) ** 2).sum()
        return value


class MASAlpha(MAS):
    """Every task counts the same, however large its outputs, and pulls towards its own end."""

    def terms(self):
        """alpha_t S_t is the same for all t, S_t = sum_i Omega_t,i, and sum_t alpha_t = lam T."""
        totals = [sum(w.sum() for w in omega.values()) for omega, _ in self.tasks]
        inverse = sum(1 / total for total in totals)
        alphas = [self.lam * len(totals) / (total * inverse) for total in totals]
        return [(alpha, *task) for alpha, task in zip(alphas, self.tasks, strict=True)]


if __name__ == "__main__":
    torch.manual_seed(0)
    centres = 2 * torch.randn(3, 8, 20)  # Of three tasks, with two clouds for each of four classes.
    cloud = torch.arange(600) % 8
    tasks = [(c[cloud] + torch.randn(600, 20), cloud % 4) for c in centres]
    for name, kind, lam in (
        ("fine-tuning", MAS, 0.0),
        ("MAS", MAS, 0.01),
        ("MAS-alpha", MASAlpha, 0.01),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
        method = kind(model, lam)
        for x, y in tasks:
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
            for _ in range(100):
                optimizer.zero_grad()
                (nn.functional.cross_entropy(model(x[:300]), y[:300]) + method.penalty()).backward()
                optimizer.step()
            method.consolidate(x[:100])
        kept = [(model(x[300:]).argmax(1) == y[300:]).double().mean() for x, y in tasks]
        print(f"{name:12}", *(f"{float(accuracy):6.1%}" for accuracy in kept))
