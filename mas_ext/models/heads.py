"""Heads: one for each task behind a backbone that all tasks share, and weights from files for that."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mas_ext._arguments import check_count, hint


class MultiHead(nn.Module):
    """A backbone and its heads: x -> backbone -> (N, width) -> one linear head per task, (N, classes).

    Parameters are called `backbone.*` and `heads.0.weight`, `heads.0.bias`, ... There is no head until
    `add_head` is called.

    Attributes:
        keep_statistics: BatchNorm stays in eval mode while everything else is trained, so that later tasks
            do not change the running statistics of earlier ones.
    """

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.keep_statistics = False
        self.backbone = backbone
        self.width = width
        self.heads = nn.ModuleList()

    @property
    def outputs(self) -> list[int]:
        """How many outputs each head has."""
        return [len(head.weight) for head in self.heads]  # type: ignore[arg-type]

    def add_head(self, classes: int) -> None:
        """Append a head with `classes` outputs, on the device and of the dtype of the backbone."""
        check_count(classes, "classes")
        weights = (p for p in self.backbone.parameters() if p.is_floating_point())
        like = next(weights, torch.empty(0))
        # Drawn on the CPU: a seed gives the same head on every device.
        head = nn.Linear(self.width, classes, device="cpu", dtype=like.dtype)
        self.heads.append(head.to(like.device))

    def train(self, mode: bool = True) -> MultiHead:
        """Training mode for everything but what `keep_statistics` holds."""
        super().train(mode)
        if self.keep_statistics:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor, head: int | None = None) -> Tensor:
        """The logits of one head, or of all heads side by side, in the order of the tasks (None)."""
        if not self.heads:
            raise ValueError("model: got no head, expected at least one: call add_head")
        return self.classify(self.backbone(x), head)

    def classify(self, features: Tensor, head: int | None = None) -> Tensor:
        """The logits of one head, or of all heads (None), for the backbone's features, (N, width)."""
        if head is None:
            return torch.cat([each(features) for each in self.heads], dim=1)
        logits: Tensor = self.heads[head](features)
        return logits


def with_heads(module: nn.Module, head: str = "fc") -> MultiHead:
    """Any network as a backbone: its last layer, the nn.Linear called `head`, is taken out.

    The module itself is changed: from now on it returns the features.

    Raises:
        ValueError: no layer of that name, or one that is no nn.Linear; nothing has changed then.
    """
    found = dict(module.named_modules()).get(head) if head else None
    if not isinstance(found, nn.Linear):
        linear = [name for name, each in module.named_modules() if name and type(each) is nn.Linear]
        kind = (
            "nothing of that name" if found is None else f"a layer of type {type(found).__name__}"
        )
        raise ValueError(
            f"head: got {head!r}, {kind}, expected the name of an nn.Linear"
            + (f"; {hint(head, linear)}" if linear else "; the module has no nn.Linear")
        )
    parent, _, name = head.rpartition(".")
    setattr(module.get_submodule(parent), name, nn.Identity())
    return MultiHead(module, found.in_features)


def load_backbone(model: MultiHead, path: str | Path) -> list[str]:
    """Read the backbone's weights from a file.

    Args:
        model: takes the weights.
        path: a safetensors file if it ends so, else what torch.save wrote, of which only tensors are ever
            read: a state dict, or a dict with one as `state_dict` or `model`. Names may begin with
            `module.` or `_orig_mod.`, and be those of the backbone or of a whole `MultiHead`.

    Returns:
        The names of the file's head, which is left out.

    Raises:
        ValueError: unless the file has every weight of the backbone in its shape, and beyond them those of
            a single layer, the head, or of a MultiHead's heads; nothing has changed then.
    """
    path = Path(path)
    found, wanted = _unwrapped(_read(path)), model.backbone.state_dict()
    # Older versions of torch did not count BatchNorm's batches, and nearly nothing uses the number.
    missing = [n for n in wanted if n not in found and not n.endswith(".num_batches_tracked")]
    if missing:
        raise ValueError(
            f"{path}: got no {missing[0]!r} (and {len(missing) - 1} others missing), expected all "
            f"{len(wanted)} weights of the backbone"
        )
    for name in wanted.keys() & found.keys():
        old, new = wanted[name], found[name]
        if old.shape != new.shape or old.is_floating_point() != new.is_floating_point():
            raise ValueError(
                f"{path}: got {name!r} as {new.dtype} of shape {tuple(new.shape)}, "
                f"expected {old.dtype} of shape {tuple(old.shape)}"
            )
    left = sorted(found.keys() - wanted.keys())
    layers = {name.rpartition(".")[0] for name in left if not name.startswith("heads.")}
    if len(layers) > 1:
        raise ValueError(
            f"{path}: got {len(layers)} layers that the backbone lacks, {', '.join(sorted(layers)[:4])}, "
            "expected one, the head"
        )
    with torch.no_grad():
        for name in wanted.keys() & found.keys():
            wanted[name].copy_(found[name])
    return left


def _read(path: Path) -> Mapping[str, Tensor]:
    content = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load(content)
        else:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file may raise anything
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: got a damaged file, or one with code, expected weights alone ({first})"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    values = state if isinstance(state, Mapping) else {"the whole file": state}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: got {type(value).__name__} as {name!r}, expected a dict of tensors"
            )
    return values


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the prefixes that wrappers put in front of all names."""
    for prefix in ("module.", "_orig_mod.", "backbone."):
        if all(name.startswith((prefix, "heads.")) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)
