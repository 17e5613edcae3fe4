"""The callback, the mixin and `attach` in Hugging Face's loops, beside the same training written out."""

from __future__ import annotations

import copy
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import GradientState
from integrations.ranks import both
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import mas_ext
from mas_ext import FusedMASPenalty
from mas_ext.integrations.loading import at_most, once
from mas_ext.integrations.transformers import (
    FILE,
    TEACHER,
    LogitDistillation,
    MASCallback,
    MASTrainerMixin,
    ModelOutput,
    attach,
)

LAM, LR, LENGTH, WORDS = 0.02, 0.1, 7, 11
Named = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    model: nn.Module = LlamaForCausalLM(config).double()
    return model


def corpus(t: int, rows: int = 14) -> list[dict[str, Tensor]]:
    """Padded texts of different lengths, so that batches have different numbers of tokens."""
    generator = torch.Generator().manual_seed(t)
    found = []
    for i in range(rows):
        ids = torch.randint(WORDS, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < 3 + i % 5).long()
        found.append(
            {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        )
    return found


class InOrder(Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)


class Penalised(MASTrainerMixin, InOrder):
    pass


def arguments(folder: Path, parts: int = 3, clip: float = 0.0, **options: Any) -> TrainingArguments:
    settings = {
        "save_strategy": "no",
        "num_train_epochs": 2,
        "learning_rate": LR,
        "per_device_train_batch_size": 2,
        **options,
    }
    return TrainingArguments(
        str(folder),
        gradient_accumulation_steps=parts,
        max_grad_norm=clip,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def token_losses(model: nn.Module, rows: list[dict[str, Tensor]]) -> Tensor:
    """Of every token that has a label, one text after another."""
    found = []
    for row in rows:
        logits = model(row["input_ids"][None], row["attention_mask"][None]).logits[0]
        losses = F.cross_entropy(logits[:-1], row["labels"][1:], reduction="none")
        found.append(losses[row["labels"][1:] != -100])
    return torch.cat(found)


def divergence(model: nn.Module, teacher: nn.Module, rows: list[dict[str, Tensor]]) -> Tensor:
    """The mean over positions that count of sum_c q*_c log(q*_c / q_c), q = softmax(logits / 2)."""
    found = []
    for row in rows:
        count = int(row["attention_mask"].sum())
        ids = row["input_ids"][None, :count]
        q, target = ((m(ids).logits[0] / 2).softmax(-1) for m in (model, teacher))
        target = target.detach()
        found.append((target * (target / q).log()).sum(-1))
    return torch.cat(found).mean()


def importance(model: nn.Module, rows: list[dict[str, Tensor]]) -> Named:
    """1/N sum_k abs(d sum over positions that count of |logits|^2 / d theta)."""
    theta = dict(model.named_parameters())
    total = {n: torch.zeros_like(p) for n, p in theta.items()}
    for row in rows:
        count = int(row["attention_mask"].sum())
        value = model(row["input_ids"][None, :count]).logits.square().sum()
        for n, g in zip(theta, torch.autograd.grad(value, list(theta.values())), strict=True):
            total[n] += g.abs()
    return {n: t / len(rows) for n, t in total.items()}


def pull(model: nn.Module, omega: Named, anchor: Named, lam: float = LAM) -> Tensor:
    theta = dict(model.named_parameters())
    return (
        lam * torch.stack([(w * (theta[n] - anchor[n]) ** 2).sum() for n, w in omega.items()]).sum()
    )


def second_task(
    model: nn.Module,
    omega: Named,
    anchor: Named,
    parts: int,
    clip: float,
    clipped: bool,
    mean_of_means: bool = False,
    texts: int = 14,
    distillation: float = 0.0,
) -> None:
    """Two epochs: groups of `parts` batches of two texts a step, the last group a short one."""
    rows, teacher = corpus(1, texts), copy.deepcopy(model)
    for start in [*range(0, len(rows), 2 * parts)] * 2:
        group = rows[start : start + 2 * parts]
        model.zero_grad()
        if mean_of_means:
            means = [token_losses(model, group[i : i + 2]).mean() for i in range(0, len(group), 2)]
            torch.stack(means).mean().backward()
        else:
            token_losses(model, group).mean().backward()
        if distillation:
            parts_of = [group[i : i + 2] for i in range(0, len(group), 2)]
            terms = [divergence(model, teacher, few) for few in parts_of]
            (distillation * torch.stack(terms).mean()).backward()
        if clipped:
            pull(model, omega, anchor).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if not clipped:
            pull(model, omega, anchor).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= LR * p.grad


def close(got: nn.Module, expected: nn.Module, rtol: float = 1e-5) -> None:
    for (n, p), q in zip(got.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol * 1e-1, msg=n)


@pytest.mark.parametrize(("parts", "clip"), [(1, 0.0), (3, 0.0), (3, 0.2)])
def test_callback(tmp_path: Path, parts: int, clip: float) -> None:
    """The penalty once a step, behind clipping; importance without labels, padding left out."""
    model = network()
    options = {"forward": ModelOutput("logits"), "omega_dtype": torch.float64}
    mas = MASCallback(LAM, **options)
    InOrder(model, arguments(tmp_path), train_dataset=corpus(0), callbacks=[mas]).train()
    assert mas.penalty is not None
    omega, written = importance(model, corpus(0)), copy.deepcopy(model)
    for n, w in omega.items():
        torch.testing.assert_close(mas.penalty.omega[n], w, rtol=1e-5, atol=1e-8, msg=n)
    anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    own = arguments(tmp_path, parts, clip)
    InOrder(model, own, train_dataset=corpus(1), callbacks=[mas]).train()
    second_task(written, omega, anchor, parts, clip, clipped=False)
    close(model, written)
    assert mas.penalty.num_tasks == 2


def test_strength_by_name(tmp_path: Path) -> None:
    model = network()
    options = {"forward": ModelOutput("logits"), "omega_dtype": torch.float64}
    mas = MASCallback(LAM, strength={"*": 0.5, "*.self_attn.*": 2.0}, **options)
    InOrder(model, arguments(tmp_path), train_dataset=corpus(0), callbacks=[mas]).train()
    assert mas.penalty is not None
    omega = importance(model, corpus(0))
    assert {".self_attn." in n for n in omega} == {True, False}
    for n, w in omega.items():
        expected = (2.0 if ".self_attn." in n else 0.5) * w
        torch.testing.assert_close(mas.penalty.omega[n], expected, rtol=1e-5, atol=1e-8, msg=n)


@pytest.mark.parametrize("items", [True, False])
@pytest.mark.parametrize(("parts", "clip"), [(1, 0.0), (3, 0.0), (3, 0.2)])
def test_mixin(tmp_path: Path, parts: int, clip: float, items: bool) -> None:
    """The penalty once a step, clipped with the rest, whether losses are summed or their mean is taken."""
    model = network()
    penalty = FusedMASPenalty(model, LAM, forward=ModelOutput("logits"), omega_dtype=torch.float64)
    trainer = Penalised(model, arguments(tmp_path, parts, clip), train_dataset=corpus(1))
    trainer.penalty, trainer.model_accepts_loss_kwargs = penalty, items
    penalty.consolidate([stacked(corpus(0))])
    written, omega = copy.deepcopy(model), importance(model, corpus(0))
    anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer.train()
    second_task(written, omega, anchor, parts, clip, clipped=True, mean_of_means=not items)
    close(model, written)

    # Evaluation is of the task alone.
    found = trainer.evaluate(corpus(2))["eval_loss"]
    batches = [corpus(2)[i : i + 8] for i in (0, 8)]
    expected = sum(len(b) * float(token_losses(model, b).mean().detach()) for b in batches) / 14
    assert found == pytest.approx(expected, rel=1e-5)
    trainer.penalty.consolidate(once(trainer.get_train_dataloader()))
    assert penalty.num_tasks == 2


@pytest.mark.parametrize("scaled", [True, False])
def test_a_trainer_that_says_how_its_loss_is_scaled(tmp_path: Path, scaled: bool) -> None:
    model = network()
    penalty = FusedMASPenalty(model, LAM, forward=ModelOutput())
    penalty.consolidate([stacked(corpus(0))])
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    trainer = Penalised(model, arguments(tmp_path), train_dataset=corpus(1))
    trainer.loss_is_scaled_for_ga, trainer.current_gradient_accumulation_steps = scaled, 4
    inputs = stacked(corpus(1)[:2])
    plain = trainer.compute_loss(model.train(), inputs)
    trainer.penalty = penalty
    loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
    value = penalty() / (4 if scaled else 1)
    torch.testing.assert_close(loss - plain, value.detach(), check_dtype=False, rtol=1e-6, atol=0)
    assert outputs.logits.shape == (2, LENGTH, WORDS)


def test_a_mixin_behind_the_trainer_is_refused() -> None:
    """Its loss would never be asked for."""
    with pytest.raises(
        TypeError, match=r"expected it before, as in class Wrong\(MASTrainerMixin, "
    ):
        type("Wrong", (Trainer, MASTrainerMixin), {})


# -- a base that was trained elsewhere -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["data set", "loader"])
def test_what_the_base_knows_is_remembered_once(tmp_path: Path, kind: str) -> None:
    """Before the first step, of the base's weights; later trainings add their own."""
    texts: Any = corpus(0)
    if kind == "loader":
        texts = DataLoader(texts, batch_size=4, collate_fn=stacked)
    model, told = network(), copy.deepcopy(network())
    options = {"forward": ModelOutput("logits"), "omega_dtype": torch.float64}
    mas = MASCallback(LAM, remember=texts, **options)
    InOrder(model, arguments(tmp_path), train_dataset=corpus(1), callbacks=[mas]).train()
    omega = importance(told, corpus(0))
    anchor = {n: p.detach().clone() for n, p in told.named_parameters()}
    second_task(told, omega, anchor, 3, 0.0, clipped=False)
    close(model, told)
    assert mas.penalty is not None
    assert mas.penalty.num_tasks == 2
    InOrder(model, arguments(tmp_path), train_dataset=corpus(2), callbacks=[mas]).train()
    assert mas.penalty.num_tasks == 3


def test_remembering_leaves_random_numbers(tmp_path: Path) -> None:
    found = []
    for own in ({}, {"remember": Noisy()}):
        model = network()
        trainer = Trainer(
            model,
            arguments(tmp_path, seed=5),
            train_dataset=Noisy(),
            callbacks=[MASCallback(0.0, **own)],
        )
        trainer.train()
        found.append(model)
    close(*found, 0)


def test_at_most_so_many_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same ones, drawn over the whole data set, of what is remembered and of every task."""
    model = network()
    drawn = torch.randperm(14, generator=torch.Generator().manual_seed(0))[:5]
    assert sorted(drawn.tolist()) != [*range(5)]
    options = {"forward": ModelOutput("logits"), "omega_dtype": torch.float64}
    mas = MASCallback(LAM, remember=corpus(0), max_samples=5, progress=True, **options)
    expected = importance(model, [corpus(0)[i] for i in drawn])
    InOrder(model, arguments(tmp_path), train_dataset=corpus(1), callbacks=[mas]).train()
    for n, w in importance(model, [corpus(1)[i] for i in drawn]).items():
        expected[n] += w
    assert mas.penalty is not None
    for n, w in expected.items():
        torch.testing.assert_close(mas.penalty.omega[n], w, rtol=1e-5, atol=1e-8, msg=n)
    shown = capsys.readouterr().err
    assert shown.count("importance:   0%") == 2
    assert shown.count("3/3") >= 1


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_lam_by_itself(tmp_path: Path, mode: Any) -> None:
    """It is that of choose_lam in a loop written out, and training is as with that number."""
    model, lams = network(), []
    mas = MASCallback("auto", mode=mode, remember=corpus(0), keep=0.9)
    for t in (1, 2):
        plain = copy.deepcopy(model)
        penalty = FusedMASPenalty(plain, forward=ModelOutput(), process_group=None)
        if mas.penalty is None:
            penalty.consolidate([stacked(corpus(0)[i : i + 8]) for i in (0, 8)])
        else:
            penalty.load_state_dict(mas.penalty.state_dict())

        def learn(model: Any = plain, t: int = t) -> Iterator[torch.optim.Optimizer]:
            optimizer = torch.optim.SGD(model.parameters(), LR)
            batches = 3 * [stacked(corpus(t)[i : i + 2]) for i in range(0, 14, 2)]
            for step in range(6):
                optimizer.zero_grad()
                for batch in batches[3 * step : 3 * step + 3]:
                    (model(**batch).loss / 3).backward()
                optimizer.step()
                yield optimizer

        def measure(model: Any = plain) -> tuple[float, tuple[()]]:
            with torch.no_grad():
                return float(model(**stacked(corpus(3, 8))).loss), ()

        expected = mas_ext.choose_lam(penalty, learn, measure, 0.9, lams)  # type: ignore[arg-type]
        trainer = InOrder(
            model,
            arguments(tmp_path),
            train_dataset=corpus(t),
            eval_dataset=corpus(3, 8),
            callbacks=[mas],
        )
        trainer.train()
        assert mas.penalty is not None
        lams.append(mas.penalty.lam)
        assert lams[-1] == pytest.approx(expected, rel=1e-6)

        told = MASCallback(lams[-1], mode=mode, remember=corpus(0), keep=0.9)
        if t > 1:
            told.penalty = FusedMASPenalty(plain, forward=ModelOutput(), process_group=None)
            told.penalty.load_state_dict(penalty.state_dict())
            told.penalty.lam = lams[-1]
        InOrder(plain, arguments(tmp_path), train_dataset=corpus(t), callbacks=[told]).train()
        close(model, plain, 0)
    assert lams[0] > 0
    assert lams[0] != lams[1]


class Remembering(InOrder):
    """It keeps numbers and lists of what its losses are computed from, as trl's does."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.tokens, self.seen = 0, {"train": [0], "eval": [0]}

    def compute_loss(self, model: Any, inputs: Any, *given: Any, **options: Any) -> Any:
        self.tokens += inputs["input_ids"].numel()
        self.seen["train" if model.training else "eval"].append(self.tokens)
        return super().compute_loss(model, inputs, *given, **options)


class Begun(TrainerCallback):  # type: ignore[misc]
    """What a Trainer keeps when its first step begins."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.loaders = [*GradientState().dataloader_references]
            self.tokens, self.seen = self.trainer.tokens, copy.deepcopy(self.trainer.seen)


def test_lam_by_itself_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    seen = []
    for lam in ("auto", 1.0):
        mas, begun = MASCallback(lam, remember=corpus(0)), Begun()
        begun.trainer = trainer = Remembering(
            network(),
            arguments(tmp_path),
            train_dataset=corpus(1),
            eval_dataset=corpus(3, 8),
            callbacks=[mas, begun],
        )
        before = len(GradientState().dataloader_references)
        trainer.train()
        assert len(mas.lams) == (lam == "auto")
        loaders = len(begun.loaders) - before
        seen.append((begun.tokens, begun.seen, loaders, trainer.tokens, trainer.seen))
    assert seen[0] == seen[1]
    assert len(seen[0][-1]["train"]) == 1 + 14


def test_lam_by_itself_with_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    """It is trained by that one, not by the arguments' one, which differs in its learning rate here."""
    lams = []
    for options, lr in (({}, 3 * LR), ({"learning_rate": 3 * LR}, None)):
        model, mas = network(), MASCallback("auto", remember=corpus(0))
        own = lr and torch.optim.SGD(model.parameters(), lr)
        schedule = own and torch.optim.lr_scheduler.LambdaLR(own, lambda step: 1.0)
        trainer = InOrder(
            model,
            arguments(tmp_path, **options),
            train_dataset=corpus(1),
            eval_dataset=corpus(3, 8),
            callbacks=[mas],
            optimizers=(own, schedule),
        )
        trainer.train()
        lams += mas.lams
    assert lams[0] == pytest.approx(lams[1], rel=1e-9)
    model, mas = network(), MASCallback("auto", remember=corpus(0))
    data = {"train_dataset": corpus(1), "eval_dataset": corpus(3, 8)}
    own = torch.optim.RMSprop(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(own, lambda step: 1.0)
    with pytest.raises(
        ValueError, match='lam: got "auto" with RMSprop, expected SGD, Adam or AdamW'
    ):
        InOrder(
            model, arguments(tmp_path), callbacks=[mas], optimizers=(own, schedule), **data
        ).train()
    assert mas.penalty is None


def test_lam_by_itself_needs_data_of_the_new_task(tmp_path: Path) -> None:
    for held_out in (None, {"a": corpus(2)}):
        mas = MASCallback("auto", remember=corpus(0))
        data = {"train_dataset": corpus(1), "eval_dataset": held_out}
        with pytest.raises(ValueError, match=r"eval_dataset is (NoneType|dict), expected one"):
            InOrder(network(), arguments(tmp_path), callbacks=[mas], **data).train()
    with pytest.raises(ValueError, match="keep: got 2, expected"):
        MASCallback("auto", keep=2)


@pytest.mark.parametrize("size", [4, 5, 8])
def test_at_most_so_many_of_anything(size: int) -> None:
    x = torch.arange(14.0)[:, None]
    batches = [(part, [*range(len(part))]) for part in x.split(size)]
    for count in (1, 5, 14, 20):
        found = [*at_most(iter(batches), count)]
        assert torch.equal(torch.cat([part for part, _ in found]), x[:count])
        assert all(len(part) == len(numbers) for part, numbers in found)
    assert at_most(batches, None) is batches
    whole = DataLoader(TensorDataset(x), batch_size=size)
    (few,) = torch.cat([part for (part,) in at_most(whole, 7)]).T
    assert len({*few.tolist()}) == 7
    assert torch.equal(few, torch.cat([part for (part,) in at_most(whole, 7)])[:, 0])


def test_wrong_things_to_remember() -> None:
    for options, error, words in (
        ({"remember": True}, ValueError, "remember: got True without distillation"),
        ({"remember": 5}, TypeError, "remember: got int, expected a data set, batches, or True"),
        ({"distillation": -1.0}, ValueError, r"distillation: got -1\.0"),
        ({"temperature": 0.0}, ValueError, r"temperature: got 0\.0"),
        ({"max_samples": 0}, ValueError, "max_samples: got 0, expected a whole number from 1"),
    ):
        with pytest.raises(error, match=words):
            MASCallback(**options)  # type: ignore[arg-type]


# -- distillation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("form", ["callback", "mixin"])
def test_distillation_is_a_term_of_the_loss(
    tmp_path: Path, form: str, parts: int, items: bool
) -> None:
    """The mean over a step's batches, beside the penalty, whether losses are summed or averaged."""
    model, weight = network(), 0.7
    options = {"forward": ModelOutput("logits"), "omega_dtype": torch.float64}
    written, omega = copy.deepcopy(model), importance(model, corpus(0))
    anchor = {n: p.detach().clone() for n, p in written.named_parameters()}
    own = arguments(tmp_path, parts)
    if form == "callback":
        mas = MASCallback(LAM, remember=corpus(0), distillation=weight, **options)
        trainer = InOrder(model, own, train_dataset=corpus(1), callbacks=[mas])
    else:
        trainer = Penalised(model, own, train_dataset=corpus(1))
        trainer.penalty = FusedMASPenalty(model, LAM, **options)
        trainer.penalty.consolidate([stacked(corpus(0))])
        trainer.distillation = LogitDistillation(model, weight)
    trainer.model_accepts_loss_kwargs = items
    plain = trainer.evaluate(corpus(2))["eval_loss"]
    trainer.train()
    second_task(
        *(written, omega, anchor, parts, 0.0),
        clipped=False,
        mean_of_means=not items,
        distillation=weight,
    )
    close(model, written)
    assert "compute_loss" not in vars(trainer)
    # Evaluation is of the task alone.
    found = trainer.evaluate(corpus(2))["eval_loss"]
    batches = [corpus(2)[i : i + 8] for i in (0, 8)]
    expected = sum(len(b) * float(token_losses(model, b).mean().detach()) for b in batches) / 14
    assert found == pytest.approx(expected, rel=1e-5) != plain


def test_without_data_the_outputs_alone_are_held(tmp_path: Path) -> None:
    """remember=True: from the first training on; else distillation counts once there was a task."""
    for remember in (None, True):
        model, written = network(), network()
        mas = MASCallback(0.0, remember=remember, distillation=2.0)
        InOrder(model, arguments(tmp_path), train_dataset=corpus(1), callbacks=[mas]).train()
        nothing = {n: torch.zeros_like(p) for n, p in written.named_parameters()}
        weight = 2.0 if remember else 0.0
        second_task(written, nothing, nothing, 3, 0.0, clipped=False, distillation=weight)
        close(model, written)
        # The teacher of the second training is the model after the first one.
        InOrder(model, arguments(tmp_path), train_dataset=corpus(1), callbacks=[mas]).train()
        second_task(written, nothing, nothing, 3, 0.0, clipped=False, distillation=2.0)
        close(model, written)


def test_the_teacher_of_lora_shares_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    moved = []
    for weight in (0.0, 1000.0):
        model = peft.get_peft_model(network(), config).double()
        base = copy.deepcopy(model)
        mas = MASCallback(0.0, remember=corpus(0), distillation=weight)
        own = arguments(tmp_path, learning_rate=1e-3 if weight else LR)
        InOrder(model, own, train_dataset=corpus(1), callbacks=[mas]).train()
        moved.append(float(divergence(model, base, corpus(1)).detach()))
        teacher = LogitDistillation(model).distill.teacher
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert all(any(p is q for q in teacher.parameters()) for p in frozen)
    assert moved[1] < 0.1 * moved[0]


def test_distillation_in_16_bits_is_that_in_float32(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    found = []
    for bf16 in (False, True):
        model = network().float()
        mas = MASCallback(LAM, remember=corpus(0), distillation=5.0)
        own = arguments(tmp_path, learning_rate=0.02, bf16=bf16)
        InOrder(model, own, train_dataset=corpus(1), callbacks=[mas]).train()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten().float() for p in network().parameters()])
    assert (found[1] - found[0]).norm() < 0.1 * (found[0] - start).norm()


@pytest.mark.parametrize("form", ["smoothed", "own loss"])
def test_distillation_where_the_trainer_takes_the_labels_out(tmp_path: Path, form: str) -> None:
    """What the term adds does not depend on how the loss is computed."""
    model = network()
    own = arguments(tmp_path, label_smoothing_factor=0.1 if form == "smoothed" else 0.0)
    function = {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.square().mean()}
    trainer = Penalised(
        *(model, own), train_dataset=corpus(1), **(function if form == "own loss" else {})
    )
    trainer.current_gradient_accumulation_steps, inputs = 1, stacked(corpus(1)[:2])
    plain = trainer.compute_loss(model.train(), dict(inputs))
    trainer.distillation = LogitDistillation(model, 3.0)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    moved = trainer.compute_loss(model, dict(inputs))
    trainer.distillation, without = None, trainer.compute_loss
    expected = without(model, dict(inputs)) + 3.0 * divergence(model, teacher, corpus(1)[:2])
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=0)
    assert plain != moved


def t5() -> Any:
    config = T5Config(
        vocab_size=WORDS,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).double()


def pairs(t: int, rows: int = 6) -> list[dict[str, Tensor]]:
    """Padded texts, and what is to be written for them."""
    found = corpus(t, rows)
    for row in found:
        row["labels"] = row["labels"].flip(0)[:5]
    return found


def answers(model: Any, row: dict[str, Tensor]) -> Tensor:
    """The logits of what is to be written, alone and without padding."""
    count, kept = int(row["attention_mask"].sum()), row["labels"] != -100
    ids, labels = row["input_ids"][None, :count], row["labels"][None]
    shifted = torch.cat([torch.zeros(1, 1).long(), labels[:, :-1].clamp(min=0)], 1)
    logits: Tensor = model(input_ids=ids, decoder_input_ids=shifted).logits[0, kept]
    return logits


def test_an_encoder_decoder(tmp_path: Path) -> None:
    """T5: importance of the logits of the decoder's tokens, and distillation of all logits there."""
    torch.manual_seed(0)
    model, told = t5(), MASCallback(LAM, remember=pairs(0), omega_dtype=torch.float64)
    base, theta = copy.deepcopy(model), dict(model.named_parameters())
    own = arguments(tmp_path, learning_rate=0.0, num_train_epochs=1)
    InOrder(model, own, train_dataset=pairs(1), callbacks=[told]).train()
    expected = {n: torch.zeros_like(p) for n, p in theta.items()}
    for t in (0, 1):
        for row in pairs(t):
            kept = row["labels"][row["labels"] != -100]
            value = answers(base, row).gather(-1, kept[:, None]).square().sum()
            grads = torch.autograd.grad(value, [*base.parameters()])
            for total, g in zip(expected.values(), grads, strict=True):
                total += g.abs() / 6
    assert told.penalty is not None
    for n, w in expected.items():
        torch.testing.assert_close(told.penalty.omega[n], w, rtol=1e-5, atol=1e-8, msg=n)

    distill, rows = LogitDistillation(model, 0.5), pairs(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    inputs = stacked(rows)
    terms = []
    for row in rows:
        q, target = ((answers(m, row) / 2).softmax(-1) for m in (model, base))
        terms.append((target * (target / q).log()).sum(-1))
    got = distill(inputs, model.eval()(**inputs))
    torch.testing.assert_close(got, 0.5 * torch.cat(terms).mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("labels", [1, 3])
def test_distillation_of_classifiers_and_of_numbers(labels: int) -> None:
    """One number is compared by its square: as one class among one, it could not differ."""
    config = LlamaConfig(**{**network().config.to_dict(), "num_labels": labels, "pad_token_id": 0})
    model = LlamaForSequenceClassification(config).double().eval()
    distill, teacher = LogitDistillation(model), copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    inputs = {"input_ids": stacked(corpus(0, 4))["input_ids"]}
    z, target = (m(**inputs).logits for m in (model, teacher))
    if labels == 1:
        expected = (z - target).square().mean()
    else:
        q, p = ((each / 2).softmax(-1) for each in (z, target))
        expected = (p * (p / q).log()).sum(-1).mean()
    assert expected > 1e-3
    torch.testing.assert_close(distill(inputs, model(**inputs)), expected, rtol=1e-9, atol=0)


def test_resumed_from_a_checkpoint(tmp_path: Path) -> None:
    """By new objects, inside the second task: as if it had not been stopped."""
    model = network()
    mas = MASCallback(LAM, omega_dtype=torch.float64)
    InOrder(model, arguments(tmp_path / "a"), train_dataset=corpus(0), callbacks=[mas]).train()
    other = copy.deepcopy(model)
    saving = arguments(tmp_path / "b", save_strategy="steps", save_steps=4)
    InOrder(model, saving, train_dataset=corpus(1), callbacks=[mas]).train()
    assert (tmp_path / "b" / "checkpoint-4" / FILE).exists()

    again = MASCallback(LAM, omega_dtype=torch.float64)
    trainer = InOrder(other, saving, train_dataset=corpus(1), callbacks=[again])
    trainer.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    close(other, model)
    assert mas.penalty is not None
    assert again.penalty is not None
    assert again.penalty.num_tasks == 2
    torch.testing.assert_close(again.penalty.alpha, mas.penalty.alpha)


@pytest.mark.parametrize("kind", [str, bool])
def test_resumed_from_a_checkpoint_of_another_folder(tmp_path: Path, kind: type) -> None:
    """The penalty, and the teacher, are found where the Trainer finds the rest; nothing is remembered twice."""
    options = {"omega_dtype": torch.float64, "remember": corpus(2), "distillation": 0.5}
    model, mas = network(), MASCallback(LAM, **options)
    other = copy.deepcopy(model)
    saving = arguments(tmp_path / "a", save_strategy="steps", save_steps=4)
    InOrder(model, saving, train_dataset=corpus(1), callbacks=[mas]).train()
    checkpoint, given = tmp_path / "a" / "checkpoint-4", kind is bool or None
    if given is None:
        given, checkpoint = str(checkpoint), checkpoint.rename(tmp_path / "checkpoint-4")
        given = str(checkpoint)
    else:
        shutil.rmtree(tmp_path / "a" / "checkpoint-6")

    again = MASCallback(LAM, **options)
    into = arguments(tmp_path / ("a" if given is True else "b"))
    trainer = InOrder(other, into, train_dataset=corpus(1), callbacks=[again])
    trainer.train(resume_from_checkpoint=given)
    close(other, model)
    for each in (mas, again):
        assert each.penalty is not None
        assert each.penalty.num_tasks == 2

    for file, words in ((TEACHER, TEACHER), (FILE, "not found, expected the penalty")):
        (checkpoint / file).unlink()
        trainer = InOrder(
            other, into, train_dataset=corpus(1), callbacks=[MASCallback(LAM, **options)]
        )
        with pytest.raises(FileNotFoundError, match=words):
            trainer.train(resume_from_checkpoint=str(checkpoint))


def test_after_a_training_that_failed(tmp_path: Path) -> None:
    """The next one with the same optimizer has the penalty once."""

    class Failing(InOrder):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 1:
                raise RuntimeError("out of memory")
            return super().training_step(*args, **kwargs)

    model, mas = network(), MASCallback(LAM)
    given = torch.optim.SGD(model.parameters(), lr=LR), None
    options = {"train_dataset": corpus(0), "callbacks": [mas], "optimizers": given}
    with pytest.raises(RuntimeError, match="out of memory"):
        Failing(model, arguments(tmp_path), **options).train()
    InOrder(model, arguments(tmp_path), **options).train()
    assert mas.penalty is not None
    assert mas.penalty.num_tasks == 1
    assert not given[0]._optimizer_step_pre_hooks


def test_wrong_arguments() -> None:
    """Refused at once, not when a task is over."""
    with pytest.raises(ValueError, match="mode: got 'prox', expected 'gradient' or 'proximal'"):
        MASCallback(mode="prox")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="batches: got list, expected a function"):
        MASCallback(batches=[])  # type: ignore[arg-type]


def test_what_was_remembered_goes_over_to_another_model(tmp_path: Path) -> None:
    mas = MASCallback(LAM, mode="proximal")
    for t in range(2):
        model = network()
        InOrder(model, arguments(tmp_path), train_dataset=corpus(t), callbacks=[mas]).train()
    assert mas.penalty is not None
    assert mas.penalty.model is model
    assert mas.penalty.num_tasks == 2


def updates(model: Any) -> dict[str, Tensor]:
    """What the adapters add to the weights."""
    layers = ((n, m) for n, m in model.named_modules() if hasattr(m, "get_delta_weight"))
    return {n: m.get_delta_weight("default").detach().clone() for n, m in layers}


@pytest.mark.parametrize(
    ("adapters", "mode", "strong"),
    [("weights", "gradient", 100.0), ("parameters", "proximal", 1000.0)],
)
def test_lora(tmp_path: Path, adapters: Any, mode: Any, strong: float) -> None:
    """Only adapters are trained and moved; their updates are held, or their factors one by one."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    model = peft.get_peft_model(network(), config).double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    moved = []
    for lam in (0.0, strong):
        own = copy.deepcopy(model)
        mas = MASCallback(lam, mode=mode, adapters=adapters)
        for t in range(2):
            held = updates(own)
            InOrder(own, arguments(tmp_path), train_dataset=corpus(t), callbacks=[mas]).train()
        moved.append(sum(float((x - held[n]).abs().sum()) for n, x in updates(own).items()))
        assert mas.penalty is not None
        factors = {n for n, p in own.named_parameters() if p.requires_grad}
        weights = {f"{n.removeprefix('base_model.model.')}.weight" for n in held}
        assert set(mas.penalty.omega) == (weights if adapters == "weights" else factors)
        frozen = [n for n, p in own.named_parameters() if not p.requires_grad]
        assert all(torch.equal(own.get_parameter(n), before[n]) for n in frozen)
    assert moved[1] < 0.6 * moved[0]


def test_two_processes(tmp_path: Path) -> None:
    """DDP: one process with all the texts; importance of 13 of them, which two ranks can't share evenly."""
    found = both("transformers", tmp_path)
    written = network()
    omega = importance(written, corpus(0, 13))
    anchor = {n: p.detach().clone() for n, p in written.named_parameters()}
    second_task(written, omega, anchor, 2, 0.0, clipped=False, texts=12, distillation=0.5)
    for rank in found:
        for n, p in written.named_parameters():
            torch.testing.assert_close(rank["state"][n], p.detach(), rtol=1e-5, atol=1e-6, msg=n)
            torch.testing.assert_close(rank["omega"][n], omega[n], rtol=1e-5, atol=1e-8, msg=n)


# -- before the first step, and after the last one -----------------------------------------------------


class Counting(InOrder):
    steps = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        Counting.steps += 1
        return super().training_step(*args, **kwargs)


CANT: dict[str, Callable[[Any, Any], Any]] = {
    "a loss": lambda model, batch: model(**batch).loss,
    "a ModelOutput": lambda model, batch: model(**batch),
    "an unknown key": lambda model, batch: model(**batch)["scores"],
    "a batch as it is": lambda model, batch: model(batch).logits,
}


@pytest.mark.parametrize("case", CANT)
@pytest.mark.parametrize("given", [False, True])
def test_what_cant_be_measured_is_told_before_the_first_step(
    tmp_path: Path, case: str, given: bool
) -> None:
    model, Counting.steps = network(), 0
    own = {"batches": lambda _: [stacked(corpus(1))]} if given else {}
    mas = MASCallback(LAM, forward=CANT[case], **own)
    before = copy.deepcopy(model)
    with pytest.raises(
        ValueError, match="model: got LlamaForCausalLM, expected one whose importance"
    ):
        Counting(model, arguments(tmp_path), train_dataset=corpus(0), callbacks=[mas]).train()
    assert Counting.steps == 0
    close(model, before, 0)


class Stream(IterableDataset[Any]):
    """Can be read once."""

    def __init__(self) -> None:
        self.read = iter(corpus(0))

    def __iter__(self) -> Any:
        return self.read


class Noisy(Dataset[Any]):
    """Changes texts by every source of random numbers that there is."""

    def __len__(self) -> int:
        return 14

    def __getitem__(self, i: int) -> Any:
        row = corpus(0)[i]
        draw = random.random() + np.random.rand() + float(torch.rand(()))
        return {**row, "input_ids": (row["input_ids"] + int(10 * draw)) % WORDS}


def test_the_trial_leaves_random_numbers_and_data(tmp_path: Path) -> None:
    """A penalty of no strength: the training with dropout is the same, bit for bit."""
    found = []
    for callbacks in ([], [MASCallback(0.0)]):
        config = network().config
        config.attention_dropout = 0.3
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).double()
        own = arguments(tmp_path, seed=5)
        Trainer(model, own, train_dataset=Noisy(), callbacks=callbacks).train()
        found.append(model)
    close(*found, 0)


def test_a_stream_is_not_tried(tmp_path: Path) -> None:
    """Its first texts would be missing in the training."""
    seen = []

    class Seeing(InOrder):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(inputs["input_ids"])
            return super().training_step(model, inputs, *args, **kwargs)

    own, mas = arguments(tmp_path, 1, max_steps=2), MASCallback(LAM)
    Seeing(network(), own, train_dataset=Stream(), callbacks=[mas]).train()
    assert torch.equal(torch.cat(seen), torch.stack([r["input_ids"] for r in corpus(0)[:4]]))


class Writes(TrainerCallback):  # type: ignore[misc]
    """Writes weights at the end of training, as averages do."""

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p *= 0.5


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("added", [False, True])
def test_weights_written_at_the_end_are_the_anchor(
    tmp_path: Path, first: bool, added: bool
) -> None:
    model = network()
    mas = MASCallback(LAM, forward=ModelOutput("logits"), omega_dtype=torch.float64)
    callbacks = [mas, Writes()] if first else [Writes(), mas]
    trainer = InOrder(model, arguments(tmp_path), train_dataset=corpus(0), callbacks=callbacks[:1])
    if added:
        trainer.add_callback(callbacks[1])
    else:
        trainer = InOrder(model, arguments(tmp_path), train_dataset=corpus(0), callbacks=callbacks)
    trainer.train()
    assert mas.penalty is not None
    assert mas.penalty.num_tasks == 1
    omega = importance(model, corpus(0))
    for n, p in model.named_parameters():
        assert torch.equal(mas.penalty.anchor[n], p.detach()), n
        torch.testing.assert_close(mas.penalty.omega[n], omega[n], rtol=1e-5, atol=1e-8, msg=n)


def test_the_best_model_that_is_loaded_at_the_end_is_the_anchor(tmp_path: Path) -> None:
    model, mas = network(), MASCallback(LAM)
    own = arguments(
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="steps",
        greater_is_better=False,
    )

    class Worse(InOrder):
        """The longer it trains, the worse."""

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            found = {"eval_steps": float(self.state.global_step)}
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, found
            )
            return found

    Worse(model, own, train_dataset=corpus(0), eval_dataset=corpus(1), callbacks=[mas]).train()
    assert mas.penalty is not None
    best = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float64)
    for (n, p), q in zip(model.named_parameters(), best.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert torch.equal(mas.penalty.anchor[n], p.detach()), n


# -- what counts as the output ---------------------------------------------------------------------


@pytest.mark.parametrize("last", [None, 2])
@pytest.mark.parametrize("of", ["logits", "tokens", "hidden"])
def test_outputs(of: Any, last: int | None) -> None:
    """Padding counts for nothing, on whichever side; text by text, without padding."""
    model, rows = network().eval(), corpus(0, 5)
    rows[1] = {key: t.flip(0) for key, t in rows[1].items()}
    output = ModelOutput(of, last)(model, stacked(rows)).square().flatten(1).sum(1)
    for i, row in enumerate(rows):
        ids = row["input_ids"][None, row["attention_mask"] == 1]
        position = torch.arange(LENGTH)[None, row["attention_mask"] == 1]
        found = model(ids, position_ids=position, output_hidden_states=True)
        if of == "hidden":
            one = found.hidden_states[-1][0]
        elif of == "logits":
            one = found.logits[0]
        else:
            one = torch.stack([x[w] for x, w in zip(found.logits[0], ids[0, 1:], strict=False)])
        one = one if last is None else one[-last:]
        torch.testing.assert_close(output[i], one.square().sum(), rtol=1e-6, atol=1e-9)


def test_outputs_without_a_mask_and_without_positions() -> None:
    model = network().eval()
    ids = corpus(0)[0]["input_ids"][None]
    logits = ModelOutput("logits")(model, {"input_ids": ids})
    torch.testing.assert_close(logits, model(ids).logits)

    class Classifier(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return type("Output", (), {"logits": x})

    x = torch.randn(3, 4)
    assert ModelOutput()(Classifier(), {"x": x, "labels": torch.zeros(3)}) is x


@pytest.mark.parametrize(
    ("of", "last", "words"), [("words", None, "of: got 'words'"), ("logits", 0, "last: got 0")]
)
def test_wrong_outputs(of: Any, last: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelOutput(of, last)


# -- accelerate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.1])
def test_accelerate(clip: float | None) -> None:
    """Two batches accumulated in a step: the penalty comes once, behind clipping."""
    torch.manual_seed(0)
    plain = nn.Linear(4, 2)
    model, written = copy.deepcopy(plain), copy.deepcopy(plain)
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=LR))
    penalty = FusedMASPenalty(model, LAM, omega_dtype=torch.float64)
    penalty.consolidate([x])
    anchor = {n: p.detach().clone() for n, p in written.named_parameters()}
    omega = {n: w.clone() for n, w in penalty.omega.items()}
    scale = float(penalty.scale)
    handle = attach(penalty, optimizer)
    for _ in range(3):
        for a, b in zip(x.split(4), y.split(4), strict=True):
            with accelerator.accumulate(model):
                accelerator.backward(F.mse_loss(model(a), b))
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        written.zero_grad()
        F.mse_loss(written(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(written.parameters(), clip)
        pull(written, omega, anchor, scale).backward()
        with torch.no_grad():
            for p in written.parameters():
                assert p.grad is not None
                p -= LR * p.grad
    close(model, written, 1e-9)
    handle.remove()


@pytest.mark.parametrize("kind", [torch.optim.SGD, mas_ext.optim.SGD])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_accelerate_skips_a_step_under_a_scaler(kind: Any, fused: bool, mode: Any) -> None:
    """Then the penalty is not applied either; the step after is taken with it, unscaled."""
    torch.set_default_dtype(torch.float32)
    model = nn.Linear(4, 2)
    own = {"fused": True} if fused and kind is torch.optim.SGD else {}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    Accelerator(cpu=True)
    optimizer = AcceleratedOptimizer(kind(model.parameters(), lr=LR, **own), scaler=scaler)
    penalty = FusedMASPenalty(model, LAM)
    penalty.consolidate([torch.randn(5, 4)])
    penalty.attach(optimizer, mode)
    with torch.no_grad():
        for p in model.parameters():
            p += 1.0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for bad in (True, False):
        optimizer.zero_grad()
        scaler.scale(0 * model(torch.randn(3, 4)).sum()).backward()
        if bad:
            model.bias.grad.fill_(float("inf"))
        optimizer.step()
        for n, p in model.named_parameters():
            c = 2 * LR * penalty.scale.float() * penalty.omega[n]
            pull = c if mode == "gradient" else c / (1 + c)
            moved = 0.0 if bad else pull * (before[n] - penalty.anchor[n])
            torch.testing.assert_close(p.detach(), before[n] - moved, rtol=1e-5, atol=1e-6)


# -- the example -----------------------------------------------------------------------------------


def test_example() -> None:
    """It runs, and what was known is kept better by a strong penalty, and by distillation, than by nothing."""
    script = Path(__file__).parents[2] / "examples" / "huggingface.py"
    command = [sys.executable, script, "--tiny", "--lam", "100", "--distillation", "30"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    before, plain, *held = (float(line.split()[-1]) for line in lines)
    assert before < plain
    assert len(held) == 3
    assert max(held) < (before + plain) / 2
    learned = [float(line.split("learned")[1].split()[0]) for line in lines]
    assert learned[1] < learned[3] < learned[0]  # distillation learns, too
