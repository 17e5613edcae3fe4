"""peft's LoRA held in weight space under fully_shard, on two processes against one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from integrations.test_peft import ADAPTED, adapted, batches, layer, penalty_of, shake
from peft import LoraConfig, get_peft_model
from processes import run
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mas_ext import FusedMASPenalty

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def full(t: Any) -> Tensor:
    return t.full_tensor().detach() if isinstance(t, DTensor) else t.detach()


@torch.no_grad()
def follow(model: nn.Module, other: nn.Module) -> None:
    """Move to where another model is."""
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert isinstance(p, DTensor)
        p.copy_(distribute_tensor(q.detach(), p.device_mesh, p.placements))


def assert_same(spread: FusedMASPenalty, alone: FusedMASPenalty, same: Any = close) -> None:
    assert spread.omega.keys() == alone.omega.keys()
    for name, expected in alone.omega.items():
        same(full(spread.omega[name]), expected)
        same(full(spread.anchor[name]), alone.anchor[name])
    shake(alone.model, 0.1)
    follow(spread.model, alone.model)
    for penalty in (spread, alone):
        penalty.model.zero_grad()
        penalty().backward()
        penalty.add_grad_()
    same(spread().detach(), alone().detach())
    for p, q in zip(spread.model.parameters(), alone.model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            same(full(p.grad), q.grad)


def every_kind_of_layer(rank: int) -> None:
    """Some in units of their own, and one whose values are kept turned."""
    twin, model = (adapted(modules_to_save=["head"]) for _ in range(2))
    for unit in (*(layer(model, name) for name in ADAPTED[:3]), model):
        fully_shard(unit)
    alone, spread = penalty_of(twin, process_group=None), penalty_of(model)
    alone.consolidate(batches())
    spread.consolidate([batches()[rank]])
    assert {f"{name}.weight" for name in ADAPTED} < spread.omega.keys()
    assert_same(spread, alone)


def merged(rank: int) -> None:
    """peft merges layers that are whole matrices; what is held goes to the model without adapters."""
    twin, model = (adapted(target_modules=["last", "turned", "table"]) for _ in range(2))
    fully_shard(model.base_model.model)
    plain = []
    for net, group, data in ((twin, None, batches()), (model, "auto", [batches()[rank]])):
        penalty = penalty_of(net, process_group=group)
        penalty.consolidate(data)
        bare = net.merge_and_unload()
        assert float(penalty().detach()) == 0
        bare.last.weight.requires_grad_(True)
        plain.append(penalty_of(bare, process_group=group))
        plain[-1].load_state_dict(penalty.state_dict())
        plain[-1].consolidate(data)
    alone, spread = plain
    assert {"last.weight", "table.weight", "turned.weight"} == spread.omega.keys()
    assert_same(spread, alone)


def language(rank: int) -> None:
    """Blocks that are checkpointed units, with a base of 16 bits under factors of 32."""

    def made(**options: Any) -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
        config = LlamaConfig(vocab_size=30, num_attention_heads=2, **sizes)
        lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
        return get_peft_model(LlamaForCausalLM(config), lora)

    twin, model = made(), made()
    shake(twin, 0.1)
    model.load_state_dict(twin.state_dict())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    for unit in (*model.base_model.model.model.layers, model):
        fully_shard(unit, mp_policy=half)
    ids = [torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    options: dict[str, Any] = {"forward": lambda m, x: m(x).logits[:, -1].float()}
    alone = FusedMASPenalty(twin, process_group=None, **options)
    spread = FusedMASPenalty(model, omega_dtype=torch.uint8, **options)
    alone.consolidate(ids)
    spread.consolidate([ids[rank]])
    for name, expected in alone.omega.items():
        error = (full(spread.omega[name]) - expected).norm() / expected.norm()
        assert float(error) < 0.1, (name, float(error))


def everything(rank: int, ranks: int) -> int:
    every_kind_of_layer(rank)
    merged(rank)
    language(rank)
    return 0


def test_equal_to_one_process(tmp_path: Path) -> None:
    run(everything, 2, tmp_path)
