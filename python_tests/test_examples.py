"""The examples that need no other library, at a small size: they run, and show what they are for."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from modules import loaded

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    module: ModuleType = loaded(name, FOLDER / f"{name}.py")
    return module


def test_examples_of_users_are_short() -> None:
    of_ranks = {"ddp.py", "fsdp.py"}
    for path in FOLDER.glob("*.py"):
        if path.name not in of_ranks:
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path.name


def test_a_pretrained_network(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("pretrained_vision")
    with torch.random.fork_rng():
        module.main(*module.pretrained(epochs=4), epochs=4)
    old = {}
    for line in capsys.readouterr().out.splitlines():
        held, _, known = line.partition(" held: ")
        old[held.strip()] = float(known.split()[1].rstrip("%"))
    assert len(old) == 4
    assert old["nothing"] + 5 < min(old[name] for name in old if name != "nothing")


def test_a_method_of_ones_own(tmp_path: Path) -> None:
    text = example("own_method").main(tmp_path / "run", seeds=1, epochs=3)
    rows = [line.split(" & ") for line in text.splitlines() if " & " in line]
    average = {row[0]: float(row[2]) for row in rows[1:]}
    assert list(average) == ["finetune", "anchored", "mas", "joint"]
    assert average["finetune"] + 5 < average["mas"] < average["joint"]


def test_a_stream(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("stream")
    with torch.random.fork_rng():
        free, held = (module.learn(lam, steps=300) for lam in (0.0, 10.0))
    assert capsys.readouterr().out.count("the loss rose") == 4
    assert max(held) < 0.1 < max(free)


def test_a_loop_in_production_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example("production")
    with torch.random.fork_rng():
        whole = module.main(tmp_path / "whole.pt", steps=120)
        assert module.main(tmp_path / "whole.pt", steps=120) == whole  # nothing is left to do
        save, count = torch.save, 0

        def stopping(*given: object) -> None:
            nonlocal count
            count += 1
            if count == 5:  # in the second task, after its first checkpoint
                raise KeyboardInterrupt
            save(*given)

        monkeypatch.setattr(torch, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            module.main(tmp_path / "stopped.pt", steps=120)
        assert module.main(tmp_path / "stopped.pt", steps=120) == whole
    ends = [torch.load(tmp_path / f"{name}.pt") for name in ("whole", "stopped")]
    for name, tensor in ends[0]["model"].items():
        assert torch.equal(tensor, ends[0]["averaged"][f"module.{name}"])
    for part in ("model", "penalty"):
        for name, tensor in ends[0][part].items():
            same = torch.equal(tensor, ends[1][part][name]) if torch.is_tensor(tensor) else True
            assert same, name
    old, new = (float(word.rstrip("%,")) for word in whole.split() if "%" in word)
    assert old > 40
    assert new > 80
