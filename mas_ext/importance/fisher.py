"""The diagonal of the Fisher information, which EWC takes for importance: squares of per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mas_ext._arguments import check_count, check_positive
from mas_ext.failures import Diverged
from mas_ext.importance import batches as batch_of
from mas_ext.importance.accumulator import ImportanceSum, LabelSource, estimate
from mas_ext.importance.batch import Batch
from mas_ext.importance.evaluation import Forward
from mas_ext.importance.exact.driver import Exact
from mas_ext.kernels.backends import Backend
from mas_ext.parameters.fsdp import Sharding
from mas_ext.parameters.names import check_patterns

Labels = Literal["true", "predicted", "sampled", "all", "normal", "reversed"]
FisherMethod = Literal["exact", "batch"]
IGNORED = -100  # positions without a label, as in torch.nn.functional.cross_entropy


def _logits(output: Tensor) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() < 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"output: got {got}, expected logits of shape (samples, ..., classes)")
    return output if output.dtype.itemsize >= 4 else output.float()


def _log_probabilities(output: Tensor) -> Tensor:
    return _logits(output).log_softmax(-1)


def _true_labels(
    batch: Any, output: Callable[[], Tensor], start: int, shift: bool | None
) -> Tensor:
    """The batch's second item, or what a mapping calls "labels"; with `shift` moved one position ahead."""
    if isinstance(batch, Mapping):
        labels = batch["labels"] if "labels" in batch else [*batch.values(), None][1]
    else:
        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"labels: got {got} as the second item of a batch, expected class indices there"
        )
    if shift is None and _are_inputs(labels, batch):
        raise ValueError(
            "shift: got none for labels that equal the input ids, expected True where position t of the output "
            "predicts label t + 1, as in causal language models, or False where it predicts label t"
        )
    if shift and labels.dim() < 2:
        raise ValueError(
            f"shift: got True for labels of shape {tuple(labels.shape)}, expected (samples, positions)"
        )
    return pad(labels[:, 1:], (0, 1), value=IGNORED) if shift else labels


def _are_inputs(labels: Tensor, batch: Any) -> bool:
    """Whether labels that have positions are the input ids, wherever there is a label."""
    named = batch.get("input_ids") if isinstance(batch, Mapping) else None
    ids = batch_of.first(batch) if named is None else named
    if not isinstance(ids, Tensor) or ids.shape != labels.shape or labels.dim() < 2:
        return False
    counted = labels != IGNORED
    return bool(counted.any()) and torch.equal(ids[counted], labels[counted].to(ids))


@torch.no_grad()
def _predicted_labels(batch: Any, output: Callable[[], Tensor], start: int) -> Tensor:
    return _log_probabilities(output()).exp().argmax(-1)


@torch.no_grad()
def _sampled_labels(batch: Any, output: Callable[[], Tensor], start: int, seed: int) -> Tensor:
    p = _log_probabilities(output()).exp()
    if not p.isfinite().all():
        raise Diverged(
            "output: got NaN or Inf, expected finite logits to draw labels from; where training diverged, "
            "a smaller lr or lam helps"
        )
    generator = torch.Generator(p.device).manual_seed(seed + start)
    drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator)
    return drawn.view(p.shape[:-1])


def _of_labels(output: Tensor, labels: Tensor | None, samples: int) -> Tensor:
    """log p of the labels, shape (samples, 1)."""
    assert labels is not None
    log_p = _log_probabilities(output)
    if labels.shape != log_p.shape[:-1]:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected {tuple(log_p.shape[:-1])} for an output "
            f"of shape {tuple(output.shape)}"
        )
    counted = labels != IGNORED
    chosen = torch.where(counted, labels, 0).long()
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < log_p.shape[-1]:
        raise ValueError(
            f"labels: got numbers from {int(chosen.min())} to {int(chosen.max())}, expected 0 to "
            f"{log_p.shape[-1] - 1}, classes of an output of shape {tuple(output.shape)}"
        )
    picked: Tensor = log_p.gather(-1, chosen[..., None])[..., 0] * counted
    return picked.reshape(samples, -1).sum(1, keepdim=True)


def _of_reversed(output: Tensor, labels: Tensor | None, samples: int) -> Tensor:
    """log p of the labels under the logits times -1, shape (samples, 1)."""
    return _of_labels(-_logits(output), labels, samples)


def _of_all(output: Tensor, labels: Tensor | None, samples: int) -> Tensor:
    """sqrt(p) log p of every class, shape (samples, classes): squares of its gradients carry the weight p."""
    log_p = _log_probabilities(output)
    if log_p.dim() != 2:
        raise ValueError(
            f'output: labels "all" takes logits (samples, classes), got shape {tuple(output.shape)}'
        )
    return log_p.detach().exp().sqrt() * log_p


def _of_normal(output: Tensor, labels: Tensor | None, samples: int) -> Tensor:
    """Every output f_c, shape (samples, outputs): the mean over y of (d log p)^2 is sum_c (d f_c)^2."""
    return output.reshape(samples, -1)


class FisherSum(ImportanceSum):
    """The sum over samples of (d log p(y | x) / d theta)^2, gathered batch by batch.

    Args:
        labels: "true", "predicted", "sampled", "all", "normal" or "reversed", see estimate_fisher.
        forward: forward(model, batch) -> logits (samples, ..., classes); by default of the first item.
        exclude: fnmatch patterns on the names of parameters to leave out.
        seed: of the labels that are drawn.
        backend: "auto", "native" or "reference".
        shift: whether true labels belong to the positions before them, see estimate_fisher.
        method: "exact" or "batch", see estimate_fisher.
        at_most: the largest value of an element of the mean, see estimate_fisher.
    """

    def __init__(
        self,
        labels: Labels = "true",
        forward: Forward | None = None,
        exclude: Sequence[str] = (),
        seed: int = 0,
        backend: Backend = "auto",
        shift: bool | None = None,
        method: FisherMethod = "exact",
        at_most: float | None = None,
    ) -> None:
        true_labels = partial(_true_labels, shift=shift)
        sources: dict[str, LabelSource | None] = {
            "true": true_labels,
            "predicted": _predicted_labels,
            "sampled": partial(_sampled_labels, seed=seed),
            "all": None,
            "normal": None,
            "reversed": true_labels,
        }
        if labels not in sources:
            raise ValueError(f"labels: got {labels!r}, expected one of {tuple(sources)}")
        if shift is not None and sources[labels] is not true_labels:
            raise ValueError(f'shift: got {shift} with labels {labels!r}, expected labels "true"')
        estimators: dict[str, Callable[..., Exact | Batch]] = {"exact": Exact, "batch": Batch}
        if method not in estimators:
            raise ValueError(f"method: got {method!r}, expected one of {tuple(estimators)}")
        if at_most is not None:
            check_positive(at_most, "at_most")
        check_count(seed, "seed", least=0)
        values = {"all": _of_all, "normal": _of_normal, "reversed": _of_reversed}
        super().__init__(
            method,
            forward=forward,
            exclude=exclude,
            backend=backend,
            estimator=estimators[method](backend, square=True),
            values=values.get(labels, _of_labels),
            labels=sources[labels],
        )
        self.labels, self.seed, self.shift, self.at_most = labels, seed, shift, at_most

    def mean(self) -> dict[str, Tensor]:
        """The Fisher information by name, no element above `at_most`; a ValueError if there was no sample."""
        return self._clamped(super().mean())

    def into_mean(self) -> dict[str, Tensor]:
        """The mean, in the memory of the sums, which are empty afterwards."""
        return self._clamped(super().into_mean())

    def _clamped(self, fisher: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.at_most is not None:
            for t in fisher.values():
                t.clamp_(max=self.at_most)
        return fisher

    def refuse_rounding_noise(
        self, theta: Mapping[str, Tensor], sharding: Sharding | None = None
    ) -> None:
        """Refuse nothing: squares vanish with the gradients of a network that has learned its labels."""


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    labels: Labels = "true",
    forward: Forward | None = None,
    max_samples: int | None = None,
    progress: bool = False,
    exclude: Sequence[str] = (),
    seed: int = 0,
    backend: Backend = "auto",
    shift: bool | None = None,
    method: FisherMethod = "exact",
    at_most: float | None = None,
) -> dict[str, Tensor]:
    """The diagonal Fisher information, 1/N sum_k (d log p(y_k | x_k) / d theta_i)^2.

    p is the softmax over the last dimension of the output; where that has positions, log p is summed over them
    (Kirkpatrick et al. 2017, equation 3; on the choice of labels, Kunstner et al. 2019).

    "exact" squares each sample's gradient. "batch" squares the mean gradient of a batch of n_b samples, as much
    of the field's code does: 1/N sum_b n_b (1/n_b sum_{k in b} d log p(y_k | x_k) / d theta_i)^2, in which
    samples cancel, so that it is smaller, and depends on the batches.

    Args:
        model: see estimate_importance.
        batches: see estimate_importance; for true labels the second item of each, or what a dict calls
            "labels", holds class indices, shape (samples, ...), -100 where there is none.
        labels: "true": the batch's own (the empirical Fisher); "predicted": the likeliest; "sampled": one drawn
            from p per sample; "all": the mean over p of all classes, one backward pass each. "normal": p is
            normal instead, with the outputs f as means and variance 1, as in regression, and the mean is over
            all y: 1/N sum_k sum_c (d f_c(x_k) / d theta_i)^2. "reversed": the true labels under the softmax of
            the logits times -1, whose gradients don't vanish where a network has learned its labels (EWC-DR;
            Liu & Chang, CVPR 2026).
        forward: forward(model, batch) -> logits (samples, ..., classes); by default of the first item.
        max_samples: stop after this many.
        progress: show a progress bar.
        exclude: fnmatch patterns on the names of parameters to leave out.
        seed: of the labels that are drawn.
        backend: see estimate_importance.
        shift: whether position t of the output predicts label t + 1, as in causal language models, whose labels
            are their input ids, rather than label t. Labels that equal the input ids need a word.
        method: "exact" or "batch", see above.
        at_most: what is larger in the result becomes this; None: nothing does. The code of EWC-DR's authors
            has 1e-4.

    Returns:
        The Fisher information by parameter name, in the parameter's shape; float64 for float64 parameters, else
        float32.

    Raises:
        ValueError: as estimate_importance; labels whose shape does not fit the output; labels that equal the
            input ids, and no `shift`.
        TypeError: as estimate_importance; labels that are no class indices.
    """
    check_patterns(model, exclude)
    total = FisherSum(labels, forward, exclude, seed, backend, shift, method, at_most)
    return estimate(total, model, batches, max_samples, progress)
