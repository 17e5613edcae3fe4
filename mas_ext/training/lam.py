"""The strength of a penalty from the new task alone, and what the penalty does while the task is learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mas_ext._arguments import check_share
from mas_ext.failures import Diverged
from mas_ext.importance.model_state import Habits, ModelState
from mas_ext.optim.hooks import Handle, Mode
from mas_ext.optim.step_size import STEP_SIZES
from mas_ext.parameters.adapters import adapted_weights
from mas_ext.parameters.fsdp import Sharding, local_parts, resharded
from mas_ext.parameters.names import is_sharded
from mas_ext.penalty import FusedMASPenalty
from mas_ext.state.low_rank import UpdateGroup

# Trains the model on the new task, with an optimizer of its own that it gives after every step.
Learn = Callable[[], Generator[Optimizer, None, None]]
# The loss of the new task, and outputs for the earlier ones, (N, ...) each, on the same new data.
Measure = Callable[[], tuple[float, Sequence[Tensor]]]

# From where to where lam goes, in units of the loss, and how often it is measured what came of it.
WEAKEST, STRONGEST, POINTS = 0.1, 1e3, 16


class Pull(NamedTuple):
    """What a penalty does to a step, with g the gradient of the loss, lam h that of the penalty, d = theta - A.

    h is 2 W d. Where low-rank updates are held theta is their factors B and A, and d what they are beyond those
    of the anchor, or all of them where an adapter is new since.

    Attributes:
        ratio: |lam h| / |g|, Euclidean norms over the parameters that are held.
        at_rest: -<g, d> / <h, d>, the lam with which the parameters would go no further from the anchor: along
            d, g + lam h is 0. Noisy from one batch; NaN at the anchor.
        held: share of the held parameters, factors left out, that the proximal form brings back by more than
            half of their distance in every step, 2 eta_i lam W_i > 1. NaN without an optimizer, before its
            first step, and where its step sizes are unknown.
    """

    ratio: float
    at_rest: float
    held: float


def read_pull(penalty: FusedMASPenalty, optimizer: Optimizer | None = None) -> Pull:
    """Read what a consolidated penalty does, after backward and before the optimizer's step.

    Gradients are those of the loss alone, as with penalty.attach; with add_grad_ it is called before that. A
    parameter without a gradient counts with 0.

    Args:
        penalty: its lam is above 0.
        optimizer: SGD, Adam or AdamW, for `held`.
    """
    slope, force, along, back = _products(penalty).tolist()
    ratio = math.sqrt(force / slope) if slope > 0 else math.inf if force > 0 else math.nan
    at_rest = penalty.lam * along / back if back > 0 else math.nan
    return Pull(ratio, at_rest, math.nan if optimizer is None else _share_held(penalty, optimizer))


@torch.no_grad()
def _products(penalty: FusedMASPenalty) -> Tensor:
    """|g|^2, |lam h|^2, -<g, d> and <lam h, d> over all that is held: float64 of shape (4,); see Pull.

    What the model lacks at the moment, such as a head that was taken off, is left out.
    """
    total = torch.zeros(4, dtype=torch.float64)
    for p, q, d in (*_of_parameters(penalty), *_of_updates(penalty)):
        g = torch.zeros_like(d) if p.grad is None else _local(p.grad).to_dense().double()
        found = torch.stack([each.sum() for each in (g * g, q * q, -g * d, q * d)])
        total = total.to(found.device) + found
    return _of_all_ranks(penalty, total)


def _local(t: Tensor) -> Tensor:
    """This rank's part of a tensor that is sharded; any other as it is."""
    return local_parts([t])[0] if is_sharded(t) else t


def _of_all_ranks(penalty: FusedMASPenalty, sums: Tensor) -> Tensor:
    """Sums over what is held, from this rank's part of them."""
    theta = {n: p for group, own in penalty.bound() for n, p in zip(group.names, own, strict=True)}
    sharding = Sharding.of(penalty.model, theta)
    return sums if sharding is None else sharding.add_up(sums)


def _of_parameters(penalty: FusedMASPenalty) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The parameters that are held, each with lam h and d in float64."""
    for group, theta in penalty.bound():
        for i, p in enumerate(theta):
            x = _local(p)
            q, w = torch.zeros_like(x, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            for alpha, (omega, anchor) in zip(
                group.state.alpha.tolist(), group.state.rows(i, x), strict=True
            ):
                d = x.double() - anchor.to(q)
                q += 2 * alpha * omega.to(q) * d
                w = w.to(q) + alpha * omega.to(q)
            yield p, q, torch.where(w > 0, q / (2 * w), d)


def _of_updates(penalty: FusedMASPenalty) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The trained factors of updates that are held, each with lam h and d in float64."""
    for group in _updates(penalty):
        pulls = {id(p): torch.zeros_like(p) for p in group.trained()}
        group.add_grad_(pulls)
        for product, anchor in zip(group.products, group.anchors, strict=True):
            starts = (None, None) if anchor is None else (anchor.left, anchor.right)
            for factor, start in zip((product.left, product.right), starts, strict=True):
                p = factor.parameter
                if id(p) in pulls:
                    d = factor.matrix(p).double()
                    d = d if start is None else d - start.to(d)
                    yield (
                        p,
                        pulls[id(p)].double(),
                        (d.T if factor.transposed else d).reshape(p.shape),
                    )


def _updates(penalty: FusedMASPenalty) -> list[UpdateGroup]:
    """The low-rank updates that are held; a ValueError where they are sharded."""
    found: list[UpdateGroup] = []
    for group in penalty.updates():
        if not isinstance(group, UpdateGroup):
            raise ValueError(
                "penalty: got one of low-rank updates under fully_shard, expected whole ones, or "
                'adapters="parameters"'
            )
        found.append(group)
    return found


@torch.no_grad()
def _share_held(penalty: FusedMASPenalty, optimizer: Optimizer) -> float:
    """The share with 2 eta lam W > 1 of the held parameters that have a step size."""
    places = {id(p): (g, i) for g, theta in penalty.bound() for i, p in enumerate(theta)}
    held_of_all = torch.zeros(2, dtype=torch.float64)
    step_sizes = STEP_SIZES.get(type(optimizer))
    if step_sizes is None:
        return math.nan
    steps = [s for group in optimizer.param_groups for s in step_sizes(group, optimizer.state)]
    for step in steps:
        for p in step.parameters:
            if id(p) in places:
                group, i = places[id(p)]
                x = _local(p)
                rows = zip(group.state.alpha.tolist(), group.state.rows(i, x), strict=True)
                w = sum(alpha * omega.to(x.device, torch.float64) for alpha, (omega, _) in rows)
                eta = torch.as_tensor(step.eta, dtype=torch.float64, device=x.device)
                if step.second_moment is not None:
                    v = _local(step.second_moment[id(p)]).double()
                    eta = eta / ((v * step.correction).sqrt() + step.eps)
                held_of_all += torch.tensor([int((2 * eta * w > 1).sum()), x.numel()])
    held, count = _of_all_ranks(penalty, held_of_all).tolist()
    return held / count if count else math.nan


def choose_lam(
    penalty: FusedMASPenalty,
    learn: Learn,
    measure: Measure,
    keep: float = 0.5,
    before: Sequence[float] = (),
) -> float:
    """The lam to learn a new task with, from its own data alone, at one and a half times its training's cost.

    The task is learned without the penalty first, for reference (as in De Lange et al. 2021, A continual
    learning survey), and from there on, for half as many steps, with a lam that grows from 0.1 to 1000 in units
    of the loss: (L_0 - L_1) / E_1, what that training gained over what the penalty at lam 1 came to. The form
    is proximal, which no lam makes diverge. On this way back to the anchor are measured, at 16 points,

        u = (L - L_1) / (L_0 - L_1)                                  the share of the task that is not learned
        v = mean over old outputs F of |F - F_0|^2 / |F_0 - mean F_0|^2        the share of them that is lost

    with F_0 the outputs at first. The point with the least (1 - keep) u + keep v is taken, or, where there are
    no outputs for earlier tasks alone, the last place with u <= keep / 10. Returned is the lam that would hold
    the model there,

        lam = -<g, d> / (2 E),   g = gradient of the loss, d = theta - A, E = sum_i W_i d_i^2,

    from the sums over the steps since the point before: on so short a way the model lags behind its lam. One
    such choice is uncertain by factors, and what is forgotten with too small a lam is lost: where there were
    choices before, the geometric mean of all of them is returned. Where low-rank updates are held, d and what
    stands for 2 E are as in Pull, and the form is "gradient", as these have no other: best with Adam, whose
    steps no lam makes longer.

    The model, its gradients and modes and what else its modules keep, the penalty and torch's random numbers
    are afterwards as before. Where the training moves nothing that has importance, 0 is returned.

    Args:
        penalty: a consolidated one, of a model that is at the start of the task.
        learn: learn() trains penalty.model on the new task from where it is, without the penalty, with a new
            optimizer, which it yields after every step. It is called twice, and the second one closed half-way;
            the penalty is attached to that one's optimizer until then.
        measure: measure() -> loss, outputs: the loss of the new task on data that it is not trained on, and the
            outputs for earlier tasks on the same data, (N, ...) each, such as those of the old heads. It
            may set modes, as by model.eval(); the training goes on in its own.
        keep: what matters, from 0 (the new task alone) to 1 (the old ones).
        before: what was returned for the earlier tasks, in order. NaN and 0, of tasks without a choice, do
            not count.

    Raises:
        ValueError: keep is not from 0 to 1; a penalty that holds nothing yet, or low-rank updates under
            fully_shard; a training without steps, or that moves nothing, or with fewer than half as many steps
            when it is called again.
        TypeError: an optimizer whose step sizes are unknown; outputs that are one tensor.
        Diverged: a loss that is not finite.
    """
    check_share(keep, "keep")
    if penalty.num_tasks == 0:
        raise ValueError("penalty: got one that holds nothing yet, expected a consolidated one")
    mode: Mode = "gradient" if _updates(penalty) else "proximal"
    with _put_back(penalty) as at_first:
        first, old = _measured(penalty, measure)
        steps = sum(1 for _ in learn())
        if steps == 0:
            raise ValueError("learn: got a training without steps, expected some")
        if not _of_all_ranks(penalty, _count_moved(at_first)) > 0:
            raise ValueError(
                f"learn: got a training of {steps} steps that moves no parameter, expected a learning rate "
                "above 0"
            )
        learned, _ = _measured(penalty, measure)
        gain = first - learned
        if not math.isfinite(gain):
            raise Diverged(
                f"loss: got {first} before the task and {learned} after learning it without the penalty, "
                "expected finite ones; a smaller lr helps"
            )
        if gain <= 0:  # nothing could be learned, and all that is lost counts
            gain = abs(first) or 1.0
        penalty.lam = 1.0
        moved = float(_products(penalty)[3]) / 2
        if not moved > 0:
            return 0.0
        points = list(_way_back(penalty, learn, measure, mode, max(1, steps // 2), gain / moved))
    unlearned = [(point.loss - learned) / gain for point in points]
    if old:
        lost = [_lost(old, point.outputs) for point in points]
        cost = [(1 - keep) * u + keep * v for u, v in zip(unlearned, lost, strict=True)]
        lam = points[min(range(len(points)), key=cost.__getitem__)].lam
    else:
        lam = _crossing([point.lam for point in points], unlearned, keep / 10)
    known = [each for each in before if each > 0]
    if not known:
        return lam
    # The last one is the mean of those before it, too.
    return math.exp((len(known) * math.log(known[-1]) + math.log(lam)) / (len(known) + 1))


class _Point(NamedTuple):
    """A place on the way back: loss and outputs there, and the lam that would hold the model."""

    loss: float
    outputs: Sequence[Tensor]
    lam: float


def _way_back(
    penalty: FusedMASPenalty, learn: Learn, measure: Measure, mode: Mode, steps: int, unit: float
) -> Iterator[_Point]:
    """Learn on for so many steps with a growing lam, and measure from time to time."""
    sums = torch.zeros(4)

    def add_products(*_: object) -> None:
        nonlocal sums
        sums = sums + _products(penalty).cpu() / torch.tensor([1.0, 1.0, 1.0, penalty.lam])

    penalty.lam = unit * WEAKEST
    handles: list[Handle | RemovableHandle] = []
    n = 0
    try:
        with closing(learn()) as training:
            for n, optimizer in enumerate(training, 1):
                if n == 1:  # in this order: products are of the loss's gradient alone
                    handles.append(optimizer.register_step_pre_hook(add_products))
                    handles.append(penalty.attach(optimizer, mode))
                if n * POINTS // steps > (n - 1) * POINTS // steps:
                    loss, outputs = _measured(penalty, measure)
                    along, back = sums[2:].tolist()
                    sums = torch.zeros(4)
                    at_rest = along / back if along > 0 and back > 0 else penalty.lam
                    yield _Point(loss if math.isfinite(loss) else math.inf, outputs, at_rest)
                penalty.lam = unit * WEAKEST * (STRONGEST / WEAKEST) ** (n / steps)
                if n == steps:
                    return
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError(
        f"learn: got {n} steps when it was called again, expected at least {steps}, half of the first time's"
    )


def _measured(penalty: FusedMASPenalty, measure: Measure) -> tuple[float, Sequence[Tensor]]:
    """Loss and outputs, with the modules' modes afterwards as before: the training goes on in them."""
    modes = [(module, module.training) for module in penalty.model.modules()]
    loss, outputs = measure()
    resharded(
        penalty.model
    )  # or what a pass without a backward pass gathered is used again, as it was
    for module, training in modes:
        module.training = training
    if isinstance(outputs, Tensor):
        raise TypeError(
            "measure: got one tensor beside the loss, expected a sequence of outputs, one for each earlier task"
        )
    return loss, outputs


def _count_moved(tensors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """How many trained parameters are others than these copies of them."""
    pairs = [(_local(t.detach()), _local(before)) for t, before in tensors if t.requires_grad]
    return torch.tensor(float(sum(not torch.equal(now, before) for now, before in pairs)))


def _crossing(lams: Sequence[float], unlearned: Sequence[float], most: float) -> float:
    """The lam up to which at most so much is unlearned, between points in proportion, in logarithms of lam."""
    last = max((k for k, u in enumerate(unlearned) if u <= most), default=0)
    if last + 1 == len(lams) or unlearned[last] > most:
        return lams[last]
    share = (most - unlearned[last]) / (unlearned[last + 1] - unlearned[last])
    return math.exp((1 - share) * math.log(lams[last]) + share * math.log(lams[last + 1]))


def _lost(old: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """The mean over outputs of |F - F_0|^2 / |F_0 - mean F_0|^2; those that do not vary are left out."""
    shares = []
    for before, now in zip(old, outputs, strict=True):
        spread = (before - before.mean(0)).double().square().sum()
        if spread > 0:
            shares.append(float((now - before).double().square().sum() / spread))
    return sum(shares) / len(shares) if shares else 0.0


@contextmanager
def _put_back(penalty: FusedMASPenalty) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Have the model, whatever its modules keep, lam and torch's random numbers afterwards as before.

    Gives the parameters and buffers, and copies of them.
    """
    model, lam = penalty.model, penalty.lam
    resharded(model)
    frozen = {id(w.weight) for w in adapted_weights(model).values()}  # of no use to copy, and large
    tensors = [
        (t, t.detach().clone())
        for t in (*model.parameters(), *model.buffers())
        if id(t) not in frozen
    ]
    state = ModelState(model, Habits())  # gradients, and whatever else modules keep
    devices = {t.device for t, _ in tensors if t.is_cuda}
    with torch.random.fork_rng(devices):
        try:
            yield tensors
        finally:
            penalty.lam = lam
            resharded(model)
            state.restore()
            with torch.no_grad():
                for t, before in tensors:
                    t.copy_(before)
