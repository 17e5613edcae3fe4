"""The command line: what it prints, where, and with which exit code."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import idx

import mas_ext
from mas_ext.cli import COMMANDS, main
from mas_ext.comparison import bench
from mas_ext.comparison.options import Config, read_toml
from mas_ext.methods import METHODS


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr about arguments that are not understood."""
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("dmeo", "did you mean 'demo'?"),
        ("inof", "did you mean 'info'?"),
        ("benchmark", "did you mean 'bench'?"),
        ("qqq", "choose from demo, run, report, info, bench"),
    ],
)
def test_unknown_command(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"unknown command '{word}', {hint}" in refused([word], capsys)
    assert hint in refused(["--debug", word, "--seed", "1"], capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "COMMAND (see mas-ext --help)"),
        (["demo", "--sede", "1"], "unrecognized arguments: --sede 1, did you mean '--seed'?"),
        (
            ["run", "--out", "x", "--seed", "1"],
            "--seed 1, did you mean '--seeds'? (see mas-ext run",
        ),
        (["run"], "the following arguments are required: --out"),
        (["run", "--out", "x", "--epochs", "1,x"], "--epochs: got 'x', expected a whole number"),
        (["demo", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["demo", "--dataset", "cifar"], "argument --dataset: invalid choice: 'cifar'"),
    ],
)
def test_wrong_arguments(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(words, capsys)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"\n    {name}\s", out)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"mas-ext {mas_ext.info()['mas_ext']}\n"


FACTS: dict[str, Any] = {
    "mas_ext": "0.1",
    "backend": "native",
    "why_not": [],
    "cpu_instruction_set": "avx2",
    "threads": 3,
    "cuda_kernels": True,
    "cuda_architectures": "90-real",
    "gpu": "H1",
    "torch": "2.10",
    "torch_cuda": "12.8",
    "python": "3.11",
    "platform": "Linux",
}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            {},
            "kernels:      compiled\nCPU:          3 threads, instruction set avx2\nGPU:          H1\n"
            "CUDA kernels: built for 90-real\nwhat hinders: nothing\n"
            "versions:     mas_ext 0.1, torch 2.10 (CUDA 12.8), Python 3.11\nplatform:     Linux\n",
        ),
        (
            {
                "backend": "reference",
                "why_not": ["it is missing", "no GPU"],
                "cpu_instruction_set": None,
                "threads": 1,
                "cuda_kernels": False,
                "cuda_architectures": None,
                "gpu": None,
                "torch_cuda": None,
            },
            "kernels:      plain PyTorch, the reference: right, and slower\nCPU:          1 thread\n"
            "GPU:          none\nCUDA kernels: none\nwhat hinders: it is missing; no GPU\n"
            "versions:     mas_ext 0.1, torch 2.10 (without CUDA), Python 3.11\nplatform:     Linux\n",
        ),
    ],
)
def test_info_in_words(
    facts: dict[str, Any],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert FACTS.keys() == mas_ext.info().keys()
    monkeypatch.setattr(sys.modules["mas_ext.info"], "info", lambda: FACTS | facts)
    assert main(["info"]) == 0
    assert capsys.readouterr().out == expected


def test_bench_passes_its_arguments_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "bench", lambda *given: f"table of {given}")
    assert main(["bench", "--model", "gpt2", "--tasks", "3", "5", "--repeats", "7"]) == 0
    assert capsys.readouterr().out == "table of ('gpt2', 'cpu', 'float32', [3, 5], 7)\n"


def test_demo_on_idx_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 100), ("t10k", 20)):
        # A bright pixel in the place of the class.
        pixels = b"".join(
            bytes(255 * (k % 10 == place) for place in range(10)) for k in range(count)
        )
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels, count, 2, 5))
        labels = bytes(k % 10 for k in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels, count))
    figure = tmp_path / "figure.png"
    words = ["demo", "--dataset", "mnist", "--data", str(tmp_path), "--out", str(figure)]

    assert main([*words, "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert "fine-tuning" in out
    assert "forgetting" in out
    assert out.endswith(f"figure: {figure}\n")
    assert figure.read_bytes().startswith(b"\x89PNG")

    (raw / "train-labels-idx1-ubyte").write_bytes(b"")
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"mas-ext: error: {raw / 'train-labels-idx1-ubyte'}: got ")
    assert err.count("\n") == 1


def test_errors_show_where_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--dataset", "mnist", "--data", str(tmp_path)]
    assert main(words) == 1
    err = capsys.readouterr().err
    assert err.startswith("mas-ext: error: mnist is not in ")
    assert err.endswith("(--debug shows where)\n")
    for with_debug in ([*words, "--debug"], ["--debug", *words]):
        assert main(with_debug) == 1
        err = capsys.readouterr().err
        assert err.startswith("Traceback")
        assert "FileNotFoundError: mnist is not in " in err


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "bench", interrupt)
    assert main(["bench"]) == 130
    assert capsys.readouterr().err == "mas-ext: interrupted\n"


RUN = ["run", "--tasks", "2", "--hidden", "16", "--epochs", "1", "--methods", "finetune,mas"]


@pytest.mark.usefixtures("one_thread")
def test_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = [*RUN, "--out", str(out)]
    assert main([*words, "--lam", "1,10", "--batch-size", "64", "--balanced"]) == 0
    printed, err = capsys.readouterr()
    table = (out / "table.md").read_text()
    assert printed == f"{table}\nall that was found: {out}\n"
    assert table.startswith("| method ")
    assert "no lam, so what was given is not for them: finetune" in err
    assert "finetune seed 0: task 2/2, accuracy " in err
    written = Config.read(read_toml(out / "config.toml"))
    assert (written.tasks, written.hidden, written.lam) == (2, (16,), (1.0, 10.0))
    assert (written.settings.batch_size, written.settings.balanced) == (64, True)
    assert list(written.methods) == ["finetune", "mas"]

    # Nothing is left to do, whatever of it is given again.
    for again in ([], ["--lam", "1,10", "--config", str(out / "config.toml")]):
        assert main(["run", "--out", str(out), "--resume", *again]) == 0
        assert capsys.readouterr().out == printed
    for other, message in (
        (["--resume", "--epochs", "2"], f"resume: '{out}' is another run: epochs was 1 and is 2"),
        (
            [],
            f"out: got '{out}', which is a run already; --resume, in Python resume=True, goes on with it",
        ),
        (["--config", str(tmp_path / "no.toml")], "[Errno 2] No such file or directory"),
        (["--scenario", "split-digit"], "got 'split-digit', did you mean 'split-digits'?"),
        (["--methods", "finetun"], "method: got 'finetun', did you mean 'finetune'?"),
    ):
        assert main(["run", "--out", str(out), *other]) == 1
        nothing, err = capsys.readouterr()
        assert not nothing
        assert err.startswith("mas-ext: error: ")
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.usefixtures("one_thread")
def test_run_from_a_file(tmp_path: Path) -> None:
    """What is on the command line goes before what is in the file; methods keep their options."""
    file, out = tmp_path / "digits.toml", tmp_path / "run"
    file.write_text(
        "methods.joint = {}\nmethods.mas = {lam = 3}\nepochs = 9\ntasks = 2\nhidden = 8\nbalanced = true"
    )
    words = ["--config", str(file), "--out", str(out), "--epochs", "1", "--no-balanced"]
    assert main(["run", *words, "--methods", "mas"]) == 0
    written = Config.read(read_toml(out / "config.toml"))
    assert written.methods == {"mas": {"lam": 3}}
    assert (written.hidden, written.tasks) == ((8,), 2)
    assert (written.settings.epochs, written.settings.balanced) == (1, False)


ARMS = """\
import torch
from mas_ext import models
from mas_ext.scenarios import Scenario, Task, Tensors


def make(folder, tasks, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 3, generator=draw)
    data = [Tensors(x, (x @ torch.randn(3, 2, generator=draw)).tanh()) for _ in range(tasks or 3)]
    return Scenario(tuple(Task(f"arm {t}", d, d, outputs=2) for t, d in enumerate(data)))


def policy(shape):
    return models.mlp(shape, (8,))


def half(output, target):
    return (output - target).square().mean() / 2


def near(output, target):
    return (output - target).abs().amax(1) < 0.5


def nothing(*given):
    return None


def by_output(output, target):
    return (output - target).square()
"""
ARM = [
    "run",
    "--scenario",
    "arms:make",
    "--model",
    "arms:policy",
    "--setting",
    "domain",
    "--epochs=2",
]


@pytest.mark.usefixtures("one_thread")
def test_run_of_a_regression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scenario, a network, a loss and a score of one's own, from a module in the working directory."""
    (tmp_path / "arms.py").write_text(ARMS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = [*ARM, "--tasks", "2", "--methods", "finetune,mas"]
    assert main([*words, "--out", "a", "--task-loss", "mse"]) == 0
    printed = capsys.readouterr().out
    assert "Accuracies are mean scores times 100, of the score minus mse." in printed
    assert Config.read(read_toml("a/config.toml")).settings.task_loss == "mse"
    own = ["--task-loss", "arms:half", "--score", "arms:near"]
    assert main([*words, "--out", "b", *own]) == 0
    assert "of the score arms:near." in capsys.readouterr().out
    assert main(["run", "--out", "b", "--resume", *own]) == 0
    matrix = {out: np.loadtxt(f"{out}/mas-seed0/accuracy.csv", delimiter=",") for out in "ab"}
    assert matrix["a"].shape == (2, 2)
    assert (matrix["a"] < 0).all()
    np.testing.assert_allclose(40 * matrix["b"], (40 * matrix["b"]).round())
    capsys.readouterr()
    for wrong, message in (
        (
            ["--task-loss", "arms:by_output"],
            "task_loss: got shape (7, 2) for outputs (7, 2) and targets",
        ),
        (
            ["--task-loss", "cross-entropy"],
            "task_loss: got the cross entropy for task 'arm 0' with targets torch.float32 of shape (2,)",
        ),
        (
            ["--task-loss", "mse", "--score", "accuracy"],
            "score: got RuntimeError for outputs (7, 2)",
        ),
        (
            ["--task-loss", "mse", "--score", "arms:by_output"],
            "score: got shape (7, 2) for outputs (7, 2)",
        ),
        (["--task-loss", "ms"], "task_loss: got 'ms', did you mean 'mse'?"),
        (["--scenario", "arms:nothing"], "scenario: got NoneType from 'arms:nothing', expected a"),
        (
            ["--scenario", "arms:mak"],
            "scenario: got 'arms:mak', expected what can be imported",
        ),
        (
            ["--model", "arms:nothing"],
            "model: got NoneType from 'arms:nothing', expected a MultiHead",
        ),
        (["--scenario", "split-digits", "--task-loss", "arms:half"], "targets torch.int64 (7,)"),
    ):
        assert main([*words, "--out", "c", *wrong]) == 1, wrong
        assert message in capsys.readouterr().err
        assert not (tmp_path / "c").exists()


TARGETS = """\
import torch
from mas_ext.scenarios import Tensors, from_datasets


def told(folder, tasks, seed):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed))
    return x, torch.stack([x.sum(1), x[:, 0] - x[:, 1], x[:, 2]], 1)


def heights(*given):
    x, y = told(*given)
    return from_datasets([(Tensors(x, y[:, k]),) * 2 for k in range(2)])


def marks(*given):
    x, y = told(*given)
    return from_datasets([(Tensors(x, y > k / 9),) * 2 for k in range(2)])
"""


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["of_mine:heights", "--task-loss", "mse"], "of the score minus mse."),
        (["of_mine:marks", "--task-loss", "bce"], "of the score minus bce."),
        (["of_mine:marks", "--task-loss", "bce", "--score", "hamming"], "of the score hamming."),
    ],
)
def test_run_of_targets_that_are_no_labels(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """from_datasets tells their kind; a single float per sample is compared with its own output alone."""
    (tmp_path / "of_mine.py").write_text(TARGETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    common = ["--hidden", "16", "--lr", "0.02", "--epochs", "20", "--methods", "finetune,mas"]
    assert main(["run", "--out", "run", "--scenario", *words, *common]) == 0
    assert told in capsys.readouterr().out
    after = np.loadtxt(
        "run/mas-seed0/accuracy.csv", delimiter=",", converters=lambda x: float(x or "nan")
    )
    # An output of 0 has a mean squared error above 1, a cross entropy of log 2, and half of all decisions.
    assert after[1].min() > (0.8 if "hamming" in words else -0.6)
    assert main(["report", "run"]) == 0
    monkeypatch.delitem(sys.modules, "of_mine")


def test_help_of_run_tells_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["run", "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    for name, value in Config().values().items():
        assert f"--{name.replace('_', '-')}" in out
        if not isinstance(value, (bool, list, dict)):
            assert f"default: {value}" in " ".join(out.split())
    for name in METHODS:
        assert name in out


def test_reproduce_tells_where_experiments_are(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["reproduce"], ["reproduce", "split-mnist", "--quick"]):
        assert "reproduce is now `python -m experiments`" in refused(words, capsys)


@pytest.mark.parametrize("word", ["--help", "info"])
def test_little_is_imported(word: str) -> None:
    """Neither experiments and benchmarks, nor torch's compiler and matplotlib."""
    code = (
        "import sys\nfrom mas_ext.cli import main\ntry:\n    main([sys.argv[1]])\n"
        "except SystemExit:\n    pass\nprint(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, word], capture_output=True, text=True, check=True
    )
    imported = set(done.stderr.split())
    assert "mas_ext.cli" in imported
    heavy = {"experiments", "benchmarks", "matplotlib", "scipy", "sklearn"}
    assert not imported & (heavy | {"torch._dynamo", "torch._inductor"})
