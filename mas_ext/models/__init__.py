"""Networks whose heads are added task by task: one with heads from any module, and networks by name."""

from mas_ext.models.heads import MultiHead, load_backbone, with_heads
from mas_ext.models.networks import (
    MODELS,
    MakeModel,
    alexnet,
    build,
    cnn,
    mlp,
    resnet18,
    resnet20,
    resnet32,
)

__all__ = [
    "MODELS",
    "MakeModel",
    "MultiHead",
    "alexnet",
    "build",
    "cnn",
    "load_backbone",
    "mlp",
    "resnet18",
    "resnet20",
    "resnet32",
    "with_heads",
]
