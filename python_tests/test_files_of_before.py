"""Files that an earlier commit wrote are read, and what was unfinished is finished with the same result.

`python python_tests/test_files_of_before.py FOLDER` writes such files by the code as it is.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import signal
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from torch import nn

from experiments import Results
from mas_ext import FusedMASPenalty, cli

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = Path(__file__).with_name("files_of_0_1")

# What a merge of its own told of merge and anchor, and the stores that went with it.
MERGES = {
    "consistent": ("consistent", "own", ("merged", "per_task")),
    "sum": ("sum", "own", ("merged", "per_task")),
    "latest": ("sum", "latest", ("merged",)),
    "decay": ("decay", "latest", ("merged",)),
}
PENALTIES = {
    f"{name}-{store}-{str(dtype).removeprefix('torch.')}": {
        "merge": merge,
        "anchor": anchor,
        "store": store,
        "omega_dtype": dtype,
        "gamma": 0.5 if merge == "decay" else 1.0,
    }
    for name, (merge, anchor, stores) in MERGES.items()
    for store in stores
    for dtype in (torch.float32, torch.bfloat16, torch.uint8)
}
TRAININGS: dict[str, dict[str, Any]] = {
    "mas-alpha": {},
    "si": {"optimizer": "sgd", "schedule": "cosine", "setting": "class"},
    "lwf": {"validation": 0.2, "patience": 2, "setting": "domain"},
}
PROTOCOL = {"epochs": 1, "widths": [2, 3]}
CELLS = [({"method": "mas", "seed": seed}, {"accuracy": 0.5 + seed}) for seed in range(2)]


def machine() -> list[str]:
    """Where the same training gives the same bits."""
    facts = Path("/proc/cpuinfo")
    cpu = re.findall(r"model name\s*: (.*)", facts.read_text() if facts.exists() else "")
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), *cpu[:1]]


def values(penalty: FusedMASPenalty, model: nn.Module) -> list[float]:
    """The penalty as it is and, after one more task, elsewhere."""
    found = [penalty().item()]
    penalty.consolidate(importance={n: torch.ones_like(p) for n, p in model.named_parameters()})
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    return [*found, penalty().item()]


def finish(name: str, checkpoint: Path) -> dict[str, Any]:
    """The accuracies and weights of a training that goes on from its checkpoint, if there is one."""
    trainer = tiny.trainer(name, checkpoint=checkpoint, **TRAININGS[name])
    result = trainer.fit(tiny.scenario(trainer.settings.setting))
    weights = {name: t.tolist() for name, t in trainer.model.state_dict().items()}
    return {"accuracy": result.accuracy.tolist(), **weights}


def assert_same(found: Any, right: Any) -> None:
    """Bit for bit on a machine like that which wrote the files; elsewhere one sample of 20 may differ."""
    error = 0.0 if machine() == expected()["machine"] else 0.06
    if isinstance(right, dict):
        assert found.keys() == right.keys()
        for name in right:
            assert_same(found[name], right[name])
    else:
        np.testing.assert_allclose(found, right, rtol=error, atol=error)


def write(folder: Path) -> None:
    """Everything that the tests read."""
    came: dict[str, Any] = {"machine": machine(), "penalties": {}, "trainings": {}}
    for name, settings in PENALTIES.items():
        model = tiny.parameters()
        penalty = tiny.consolidated(model, **settings)
        penalty.save(folder / f"{name}.safetensors")
        state = {key: t.contiguous() for key, t in penalty.state_dict().items()}
        safetensors.torch.save_file(state, folder / f"{name}-state.safetensors")
        tiny.move(model, torch.Generator().manual_seed(3))
        came["theta"] = {n: p.tolist() for n, p in model.named_parameters()}
        came["penalties"][name] = values(penalty, model)

    for name, arguments in TRAININGS.items():
        tiny.interrupt(name, folder / f"{name}.safetensors", **arguments)
        came["trainings"][name] = finish(name, folder / "uninterrupted")
        (folder / "uninterrupted").unlink()

    class Follow(StringIO):
        """Presses Ctrl-C when the last job's first task is over."""

        def write(self, text: str) -> int:
            if text.startswith("mas seed 0: task 1/2"):
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    with redirect_stderr(Follow()):
        assert cli.main([*tiny.RUN, "--out", str(folder / "run")]) == 130
    assert tiny.command(*tiny.RUN, "--out", folder / "whole") == 0
    came["run"] = tiny.found_by_run(folder / "whole")
    shutil.rmtree(folder / "whole")

    results = Results(folder / "results.json", PROTOCOL)
    for cell, found in CELLS:
        results.add(cell, found, 0.1)
    sections = (f'"{name}": {json.dumps(content)}' for name, content in came.items())
    (folder / "expected.json").write_text("{\n" + ",\n".join(sections) + "\n}\n")


@functools.cache
def expected() -> dict[str, Any]:
    """What came out where the files were written."""
    found: dict[str, Any] = json.loads((FILES / "expected.json").read_text())
    return found


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties(name: str) -> None:
    models = tiny.parameters(), tiny.parameters()
    for model in models:
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(torch.tensor(expected()["theta"][n], dtype=torch.float64).view(p.shape))
    loaded = FusedMASPenalty.load(FILES / f"{name}.safetensors", models[0])
    filled = FusedMASPenalty(models[1], **PENALTIES[name])
    filled.load_state_dict(safetensors.torch.load_file(FILES / f"{name}-state.safetensors"))
    # The kernels give the same bits everywhere.
    for penalty, model in zip((loaded, filled), models, strict=True):
        assert values(penalty, model) == expected()["penalties"][name]


@pytest.mark.parametrize("name", TRAININGS)
def test_checkpoints(name: str, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copy(FILES / f"{name}.safetensors", tmp_path))
    at = tiny.read_tree(checkpoint)["at"]
    assert (at["task"], at["epoch"], at["step"]) == (1, 1, 1)
    assert_same(finish(name, checkpoint), expected()["trainings"][name])


def test_a_run(tmp_path: Path) -> None:
    out = shutil.copytree(FILES / "run", tmp_path / "run")
    assert not (out / "mas-seed0" / "result.json").exists()
    kept = {path: path.read_bytes() for path in out.rglob("result.json")}
    assert len(kept) == 3
    assert tiny.command("run", "--out", out, "--resume") == 0
    assert_same(tiny.found_by_run(out), expected()["run"])
    assert {path: path.read_bytes() for path in kept} == kept
    assert tiny.command("report", out) == 0


def test_results_of_an_experiment(tmp_path: Path) -> None:
    file = Path(shutil.copy(FILES / "results.json", tmp_path))
    assert Results(file, PROTOCOL).where() == CELLS
    before = json.loads(file.read_text())["cells"]
    Results(file, PROTOCOL).add({"method": "mas", "seed": 2}, {"accuracy": 1.0}, 0.1)
    assert json.loads(file.read_text())["cells"][:2] == before


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).mkdir()
    write(Path(sys.argv[1]))
