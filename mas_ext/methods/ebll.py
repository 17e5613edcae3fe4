"""Encoder based lifelong learning: distillation, and codes of the features that must stay as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_ext._arguments import check_count, check_factor
from mas_ext.methods.lwf import LwF, features_of
from mas_ext.methods.method import Training
from mas_ext.models import MultiHead


@dataclass(eq=False)
class EBLL(LwF):
    """LwF + alpha/2 sum_t |c_t(f(x)) - c_t(f*(x))|^2 (Rannen et al., ICCV 2017).

    f: the model's features, f*: its teacher's (see LwF), both of the new task's samples x; means over samples.
    c_t(f) = sigmoid(W_t f + b_t) is the code of the autoencoder r_t = V_t c_t + d_t, one for every earlier task
    t, which was trained when that task ended, on its features and with the model frozen, to minimise

        reconstruction |r_t(f(x)) - f(x)|^2 + task loss of the task's head for r_t(f(x))

    by Adadelta. The model may change its features but for what that task needs of them. Only the encoders are
    kept; side by side they are one matrix, so that all codes are one product.

    Args:
        lam: of LwF, as temperature, warm_up and distance.
        alpha: strength of the codes; 0.1 in the authors' published experiment.
        code: size of a task's code: theirs is 100 (300 for ImageNet) of 9,216 features. Never more than half of
            the features: it has to be smaller than they are.
        reconstruction: the paper's lambda, 1e-6 in the authors' code. With a few hundred features this leaves
            all to the task loss; 1e-2 rebuilds them, too.
        epochs: of an autoencoder's training, 100 in the authors' code.
        lr: of Adadelta, 0.01 in the authors' code.
        max_samples: train an autoencoder on this many samples, None for all. Their features are kept meanwhile.

    Raises:
        ValueError: an argument that can't be used.
    """

    alpha: float = 0.1
    code: int = 100
    reconstruction: float = 1e-6
    epochs: int = 100
    lr: float = 0.01
    max_samples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "reconstruction", "lr"):
            check_factor(getattr(self, name), name)
        check_count(self.code, "code")
        check_count(self.epochs, "epochs")
        if self.max_samples is not None:
            check_count(self.max_samples, "max_samples")
        self.encoders: tuple[Tensor, Tensor] | None = None

    def begin_task(self, training: Training) -> None:
        if training.task == 0 and not training.resumed:
            self.encoders = None
        super().begin_task(training)

    def codes(self, features: Tensor) -> Tensor:
        """The codes of all earlier tasks side by side: features (N, width) -> (N, sum of sizes)."""
        assert self.encoders is not None
        return F.linear(features, *self.encoders).sigmoid()

    def forgetting(
        self, training: Training, features: Tensor, logits: Tensor, taught: Tensor
    ) -> Tensor:
        squares = F.mse_loss(self.codes(features), self.codes(taught), reduction="sum")
        distilled = super().forgetting(training, features, logits, taught)
        return distilled + self.alpha / 2 / len(features) * squares

    def end_task(self, training: Training) -> None:
        encoder = self._trained_encoder(training)
        new = encoder.weight.detach(), encoder.bias.detach()
        if self.encoders is not None:
            new = torch.cat([self.encoders[0], new[0]]), torch.cat([self.encoders[1], new[1]])
        self.encoders = new

    def _trained_encoder(self, training: Training) -> nn.Linear:
        model = training.model
        model.eval()
        batches = list(features_of(training, self.max_samples))
        like, code = batches[0][0], max(1, min(self.code, model.width // 2))
        encoder = nn.Linear(model.width, code, device="cpu", dtype=like.dtype).to(like.device)
        decoder = nn.Linear(code, model.width, device="cpu", dtype=like.dtype).to(like.device)
        parameters = [*encoder.parameters(), *decoder.parameters()]
        optimizer = torch.optim.Adadelta(parameters, self.lr)
        for _ in range(self.epochs):
            for features, y in batches:
                rebuilt = decoder(encoder(features).sigmoid())
                squares = F.mse_loss(rebuilt, features, reduction="sum") / len(features)
                loss = training.new_task_loss(model.classify(rebuilt, training.head), y)
                optimizer.zero_grad()
                (loss + self.reconstruction * squares).backward(inputs=parameters)
                optimizer.step()
        return encoder

    def state_dict(self) -> dict[str, Any]:
        encoders = {} if self.encoders is None else {"encoders": self.encoders}
        return {**super().state_dict(), **encoders}

    def load_state_dict(self, state: dict[str, Any], model: MultiHead) -> None:
        super().load_state_dict(state, model)
        self.encoders = None
        if "encoders" in state:
            device = next(model.parameters()).device
            weight, bias = state["encoders"]
            self.encoders = weight.to(device), bias.to(device)
