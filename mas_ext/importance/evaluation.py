"""How a model is run: in eval mode, on batches that it may change, up to the numbers that importance is of."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mas_ext.importance import batches
from mas_ext.importance.model_state import Habits, ModelState
from mas_ext.parameters.lockstep import Lockstep
from mas_ext.parameters.names import PARALLEL
from mas_ext.parameters.restoring import restoring

# The forward pass that a user may give: (model, batch) -> output, samples in dimension 0.
Forward = Callable[[Any, Any], Tensor]
# (output, labels, samples) -> the objectives, shape (rows, K). Each row counts as one sample.
Values = Callable[[Tensor, Tensor | None, int], Tensor]
# (model, device, habits) -> the state in which the model is run, and afterwards back to the state before.
RunMode = Callable[[nn.Module, torch.device, Habits], AbstractContextManager[ModelState]]

_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)


class Labelled(NamedTuple):
    """A batch as the user gave it, and labels for the objective, which are cut into samples with it."""

    batch: Any
    labels: Tensor | None = None


class Evaluate(NamedTuple):
    """From a batch to the numbers that importance is the sensitivity of."""

    model: nn.Module
    forward: Forward
    values: Values
    # What every pass starts from.
    state: ModelState
    # Of a model under fully_shard, whose ranks run every pass together.
    lockstep: Lockstep | None = None

    def output(self, batch: Labelled) -> Tensor:
        """The model's output."""
        # A model that changes its input would see it changed again on every pass, and so would the caller.
        with self.state.passing():
            return self.run(batch.batch)

    def run(self, batch: Any) -> Tensor:
        """What `forward` gives for a batch of its own."""
        given = batches.copied(batch)
        if self.lockstep is None:
            return self.forward(self.model, given)
        return self.lockstep.forward(lambda: self.forward(self.model, given))

    def stand_in(self) -> Tensor:
        """The output of what a rank runs while others run what counts."""
        assert self.lockstep is not None
        with self.state.passing():
            sample = batches.to(self.lockstep.sample, self.lockstep.device)
            return self.forward(self.model, batches.copied(sample))

    def constants(self, batch: Labelled) -> Hashable:
        """What `forward` gets that is no tensor: of two batches for which this is equal it does the same."""
        whole = batches.plain(batch.batch)
        return batches.constants(batches.first(whole) if self.forward is default_forward else whole)

    def __call__(self, batch: Labelled) -> tuple[Tensor, Tensor]:
        """The output, and the objectives of shape (rows, K)."""
        output, samples = self.output(batch), batches.size(batch)
        try:
            return output, self.values(output, batch.labels, samples)
        except ValueError as error:
            rows = output.shape[0] if isinstance(output, Tensor) and output.dim() else None
            more = batches.time_first(batches.first(batch).shape, samples, rows)
            if not more:
                raise
            raise ValueError(f"{error}{more}") from error

    def alone(self, sample: Labelled) -> tuple[Tensor, Tensor]:
        """The output and the objectives of a batch of one sample, one row each.

        A model that takes no single sample, since it squeezes its output for instance, gets it twice.
        """
        try:
            return self(sample)
        except Exception as error:
            try:
                output, values = self(batches.twice(sample))
            except Exception:
                raise error from None
            return output[:1], values[:1]


def default_forward(model: nn.Module, batch: Any) -> Tensor:
    """The model called with the first item of the batch."""
    output: Tensor = model(batches.first(batch))
    return output


@contextmanager
def evaluating(
    model: nn.Module, device: torch.device, habits: Habits | None = None
) -> Iterator[ModelState]:
    """The model with eval mode's flags and gradients on; afterwards all of it is as before, whatever happens.

    Flags alone are set: a module's own eval() may merge adapters or keep tables without their gradients. A
    module that is in eval mode already, and may have done so, is put to training by its own train() before.
    """
    habits = habits or Habits()
    modules = [*model.modules()]
    # What runs a model in parallel would wait for other ranks, whose passes have other lengths.
    parallel = _instances(modules, PARALLEL)
    devices = [device] if device.type == "cuda" else []
    # cuDNN has a backward pass of recurrent layers in training mode alone; without dropout that is the same
    # function. A subclass may be another one.
    recurrent: list[Any] = [m for m in modules if devices and type(m) in _RECURRENT]
    packing = _packing(modules)
    dropout = [layer.dropout for layer in recurrent]
    training = [module for module in modules if module.training]
    asleep = [m for m in modules if not m.training and overrides_modes(m)]
    # Autocast keeps rounded weights; those that a pass without gradients left behind would have none.
    cached = torch.is_autocast_cache_enabled()
    stances: list[Any] = []
    # An interruption at the end of a `with` keeps torch's own guards from their end.
    guards: Any = torch._C
    functions = getattr(guards, "_get_torch_function_state", lambda: None)()
    modes, function_modes = guards._len_torch_dispatch_stack(), guards._len_torch_function_stack()

    def restore() -> None:
        while guards._len_torch_dispatch_stack() > modes:
            guards._pop_torch_dispatch_stack(None)
        while guards._len_torch_function_stack() > function_modes:
            guards._pop_torch_function_stack()
        if functions is not None:
            guards._set_torch_function_state(functions)
        for wrapper in parallel:
            wrapper.__dict__.pop("forward", None)
        for stance in stances:
            stance.__exit__(None, None, None)
        for layer, before in zip(recurrent, dropout, strict=True):
            layer.training = False
            layer.dropout = before
        _set_modes(packing, False)
        torch.set_autocast_cache_enabled(cached)
        _set_modes(training, True)

    with (
        _random_state(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        _without_parametrization_cache(),
        restoring(restore),
    ):
        # Compiled parts run as they were written, so that what they compute can be followed. Nothing is
        # compiled where the compiler was never imported, which takes seconds.
        if "torch._dynamo" in sys.modules:
            stances.append(torch.compiler.set_stance("force_eager"))
        torch.set_autocast_cache_enabled(False)
        _set_modes(training, False)
        for layer in recurrent:
            layer.training = True
            layer.dropout = 0.0
        _set_modes(packing, True)
        for wrapper in parallel:
            wrapper.__dict__["forward"] = wrapper.module
        with _awake(modules, asleep, habits) as state:
            yield state


def overrides_modes(module: nn.Module) -> bool:
    """Whether a module's train() or eval() may do more than to set flags."""
    own = module.__dict__.keys() & {"train", "eval"}
    kind = type(module)
    plain = kind.train is nn.Module.train and kind.eval is nn.Module.eval
    # transformers' models exchange kernels there, where they use any.
    plain |= kind.train.__module__ == "transformers.modeling_utils" and not module.use_kernels
    return bool(own) or not (plain or issubclass(kind, (*PARALLEL, torch.jit.ScriptModule)))


@contextmanager
def _awake(
    modules: Sequence[nn.Module], asleep: Sequence[nn.Module], habits: Habits
) -> Iterator[ModelState]:
    """The model's state after the train() of modules whose eval() may have had effects; their flags stay."""
    state = original = ModelState(modules[0], habits)

    def restore() -> None:
        if state is not original:
            state.restore()
        original.restore()

    with restoring(restore):
        if asleep:
            flags = [(module, module.training) for module in modules]
            with original.watched():
                for module in asleep:
                    if not module.training:  # not yet by a module around it
                        module.train()
            for before in (False, True):
                _set_modes([m for m, flag in flags if m.training != flag == before], before)
            if original.touched():
                state = ModelState(modules[0], habits)
        yield state
    state.refuse_lost()


def _packing(modules: Sequence[nn.Module]) -> list[Any]:
    """bitsandbytes' linear layers, in which training changes nothing but how the weight is kept.

    In eval mode on a CPU they rearrange it, for good, into what has no gradient.

    Raises:
        ValueError: one that did.
    """
    layers: Any = sys.modules.get("bitsandbytes.nn")
    kinds = () if layers is None else (layers.Linear4bit, layers.Linear8bitLt)
    found = _instances(modules, kinds)
    for layer in found:
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"model: got a {type(layer).__name__} that ran in eval mode on a CPU, for which bitsandbytes "
                "packed its weight into what has no gradient, expected one that did not; load the model anew"
            )
    return found


def _instances(modules: Sequence[nn.Module], kinds: tuple[type, ...]) -> list[Any]:
    """The modules of some classes, of which isinstance would take long."""
    found = {kind for kind in {type(m) for m in modules} if issubclass(kind, kinds)}
    return [m for m in modules if type(m) in found] if found else []


def _set_modes(modules: Iterable[nn.Module], training: bool) -> None:
    for module in modules:
        if "training" in module.__dict__:  # a module takes long to set an attribute
            module.__dict__["training"] = training
        else:
            module.training = training


@contextmanager
def _random_state(devices: list[torch.device]) -> Iterator[None]:
    """Random numbers drawn inside leave all generators as they were."""
    numpy = sys.modules.get("numpy.random")  # which importing numpy alone does not load
    drawn = random.getstate(), numpy.get_state() if numpy else None

    def restore() -> None:
        random.setstate(drawn[0])
        if numpy:
            numpy.set_state(drawn[1])

    with restoring(restore), torch.random.fork_rng(devices):
        yield


@contextmanager
def _without_parametrization_cache() -> Iterator[None]:
    """Parametrized weights are computed in every pass, also inside parametrize.cached()."""
    kept = parametrize._cache_enabled, parametrize._cache

    def restore() -> None:
        parametrize._cache_enabled, parametrize._cache = kept

    with restoring(restore):
        parametrize._cache_enabled, parametrize._cache = 0, {}
        yield
