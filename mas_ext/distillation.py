"""Distillation: the outputs of a model held near those of the model as it was, on data that are at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_ext._arguments import check_choice, check_positive
from mas_ext.importance import Forward
from mas_ext.importance.evaluation import default_forward
from mas_ext.parameters.copying import Model, independent_copy
from mas_ext.parameters.names import bare_model, is_partitioned, is_sharded

Distance = Literal["classes", "squared", "tokens"]
Reduction = Literal["mean", "none"]


class _Shared(NamedTuple):
    """A frozen parameter that a model and its teacher have in common, and its version as it was."""

    name: str
    parameter: nn.Parameter
    version: int


class Distillation:
    """How far a model's outputs have moved from those of the model as it was: Learning without Forgetting.

        distill = mas_ext.Distillation(model)  # before the new task
        output = model(x)
        loss = F.cross_entropy(output, y) + lam * distill(x, output)

    The teacher is the model as it is when this is made, in eval mode: a copy of the parameters that require a
    gradient and of the buffers; frozen parameters are shared, so that with LoRA only the adapters are copied.
    No old data are needed: outputs are compared on the new ones (Li & Hoiem, ECCV 2016). Together with a
    FusedMASPenalty, which holds parameters, both terms are added.

    Args:
        model: any module; it is neither changed nor registered anywhere.
        temperature: T of the softened probabilities, > 0.
        forward: forward(model, batch) -> output; by default the model called with the batch's first item, and
            for "tokens" with all of the mapping's items but labels, of which it takes the logits.
        distance: between the output `z` and the teacher's `z*`, of whose probabilities
            `q* = softmax(z* / T)` and `q = softmax(z / T)`, not multiplied by T^2:
            "classes": the mean of `KL(q* || q) = sum_c q*_c (log q*_c - log q_c)` over samples and places, with
            classes in dimension 1;
            "squared": the mean of `(z - z*)^2`, for outputs of any kind;
            "tokens": the mean of `KL(q* || q)` over the positions of texts, (N, positions, vocabulary), that
            attention_mask leaves in.

    Raises:
        ValueError: an argument that is not one of the choices.
        TypeError: a model that is sharded, as by fully_shard.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 2.0,
        forward: Forward | None = None,
        distance: Distance = "classes",
    ) -> None:
        check_choice("distance", distance, get_args(Distance))
        self.model, self.distance = model, distance
        self.temperature = check_positive(temperature, "temperature")
        self.forward: Forward = forward or (_logits if distance == "tokens" else default_forward)
        bare = bare_model(model)
        for name, p in bare.named_parameters():
            if is_sharded(p) or is_partitioned(p):
                how = "DTensor, as by fully_shard" if is_sharded(p) else "part, as by ZeRO-3"
                raise TypeError(
                    f"parameter {name!r}: got a {how}, expected one that is whole: a teacher of a sharded "
                    "model can't be copied"
                )
        frozen = {name: p for name, p in bare.named_parameters() if not p.requires_grad}
        self.teacher = frozen_copy(bare, frozen.values())
        self._shared = [_Shared(name, p, p._version) for name, p in frozen.items()]
        # Adapters (peft) are merged into weights behind autograd's back, and layers tell that they are.
        self._mergeable: list[tuple[str, Any, bool]] = [
            (name, layer, bool(layer.merged))
            for name, layer in bare.named_modules()
            if hasattr(layer, "merged")
        ]

    def __call__(self, batch: Any, output: Tensor | None = None) -> Tensor:
        """The distance from the teacher on a batch, 0-dim and differentiable; 0 where nothing has moved.

        Args:
            batch: as `forward` takes it.
            output: the model's output for this batch, where the loop has it; else the model is run.
                Columns that came after the teacher, of classes that it does not know, count for nothing.

        Raises:
            TypeError: an output that is no tensor.
            ValueError: an output that does not fit the teacher's.
            RuntimeError: a frozen parameter that the teacher shares has been changed, or has had an adapter
                merged into it.
        """
        self._keep()
        with torch.no_grad():
            target = self.forward(self.teacher, batch)
        output = self.forward(self.model, batch) if output is None else output
        for each in (output, target):
            if not isinstance(each, Tensor):
                raise TypeError(
                    f"output: got {type(each).__name__}, expected a tensor; pass forward= to choose one"
                )
        dim = 2 if self.distance == "tokens" else 1
        if output.dim() > dim and output.dim() == target.dim():
            output = output.narrow(dim, 0, min(output.shape[dim], target.shape[dim]))
        if output.shape != target.shape or (self.distance != "squared" and output.dim() <= dim):
            raise ValueError(
                f"output: got shape {tuple(output.shape)}, expected {tuple(target.shape)} as the teacher's"
                f"{'' if self.distance == 'squared' else f', with {self.distance} in dimension {dim}'}"
            )
        wide = torch.promote_types(target.dtype, torch.float32)
        output, target = output.to(wide), target.to(wide)
        if self.distance == "squared":
            return F.mse_loss(output, target)
        if self.distance == "classes":
            return self._divergence(output, target, "mean")
        each = self._divergence(output.transpose(1, 2), target.transpose(1, 2), "none")
        counts = _positions(batch, each)
        return (each * counts).sum() / counts.sum().clamp(min=1)

    def state_dict(self) -> dict[str, Tensor]:
        """What the teacher does not share with the model, by name; for a training that is resumed."""
        shared = {id(each.parameter) for each in self._shared}
        found = self.teacher.state_dict(keep_vars=True)
        return {
            name: t.detach()
            for name, t in found.items()
            if isinstance(t, Tensor) and id(t) not in shared
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Make the teacher what it was when `state_dict` was taken; nothing changes on an error.

        Raises:
            ValueError: other names or shapes.
        """
        own = self.state_dict()
        for name in sorted(own.keys() | state.keys()):
            got, expected = (
                tuple(t[name].shape) if name in t else "no tensor" for t in (state, own)
            )
            if got != expected:
                raise ValueError(f"state, {name!r}: got {got}, expected {expected}")
        # A copy, so that an interruption leaves the old teacher whole.
        teacher = independent_copy(self.teacher, [each.parameter for each in self._shared])
        new = teacher.state_dict(keep_vars=True)
        for name in own:
            new[name].detach().copy_(state[name])
        self.teacher = teacher

    def __getstate__(self) -> dict[str, Any]:
        self._keep()  # a copy knows no other values than these
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Versions count the writes to a tensor; a copy's begin anew.
        shared = [each._replace(version=each.parameter._version) for each in state["_shared"]]
        self.__dict__.update(state, _shared=shared)

    def _divergence(self, output: Tensor, target: Tensor, reduction: Reduction) -> Tensor:
        """KL(q* || q) over dimension 1."""
        with torch.no_grad():
            entropy = softened(target, target, self.temperature, reduction)
        return softened(output, target, self.temperature, reduction) - entropy

    def _keep(self) -> None:
        """Have the teacher keep what the model is about to train; it is too late where that has begun."""
        for name, parameter, version in self._shared:
            if parameter._version != version:
                raise RuntimeError(
                    f"parameter {name!r}: got other values than when the teacher was made, expected a frozen "
                    "parameter to stay as it is; make the Distillation once it requires a gradient"
                )
        for name, layer, merged in self._mergeable:
            if bool(layer.merged) != merged:
                now, then = (("un" * (not each)) + "merged" for each in (layer.merged, merged))
                raise RuntimeError(
                    f"layer {name!r}: got its adapter {now}, expected {then} as when the teacher was made, "
                    "which shares the weight below it"
                )
        thawed = {id(each.parameter) for each in self._shared if each.parameter.requires_grad}
        if thawed:
            kept = {p: _frozen(p) for p in self.teacher.parameters() if id(p) in thawed}
            for module in self.teacher.modules():
                for key, p in module._parameters.items():
                    if p in kept:
                        module._parameters[key] = kept[p]
            self._shared = [each for each in self._shared if id(each.parameter) not in thawed]


def softened(
    logits: Tensor, target: Tensor, temperature: float, reduction: Reduction = "mean"
) -> Tensor:
    """-sum_c q*_c log q_c with q = softmax(logits / T), q* = softmax(target / T).

    Args:
        logits: the model's, classes in dimension 1.
        target: the teacher's, of the same shape.
        temperature: T.
        reduction: "mean" over all samples and places, 0-dim, or "none".
    """
    # Not all devices' autocast leaves 16 bits for a softmax, as it does for the cross entropy.
    precision = torch.promote_types(target.dtype, torch.float32)
    probabilities = (target / temperature).softmax(1, precision)
    return F.cross_entropy(logits / temperature, probabilities, reduction=reduction)


def frozen_copy(model: Model, shared: Iterable[nn.Parameter] = ()) -> Model:
    """A copy of the model in eval mode that never learns, with these of the parameters in common."""
    made = independent_copy(model, shared)
    for p in made.parameters():
        p.requires_grad_(False)
    # By flags: a module's own eval() may merge adapters into weights that are shared.
    for module in made.modules():
        module.training = False
    return made


def _frozen(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(p.detach().clone(), requires_grad=False)


def _logits(model: nn.Module, batch: Any) -> Tensor:
    """The logits of a language model for a mapping of its inputs."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch: got {type(batch).__name__}, expected a mapping of the model's inputs; pass forward="
        )
    found = model(**{key: t for key, t in batch.items() if key not in ("labels", "label")})
    logits: Tensor = found.logits
    return logits


def _positions(batch: Any, each: Tensor) -> Tensor:
    """Which of the positions count, (N, positions): 1 or 0."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None:
        return torch.ones_like(each)
    # Of more positions than the mask's the last ones are the text's: virtual tokens are put in front.
    if mask.dim() != 2 or len(mask) != len(each) or mask.shape[1] > each.shape[1]:
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}, expected (samples, positions) as the output's "
            f"{tuple(each.shape)}"
        )
    return F.pad(mask.to(each), (each.shape[1] - mask.shape[1], 0))
