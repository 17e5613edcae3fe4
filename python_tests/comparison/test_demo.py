"""The demo on the digits: what it claims must be true, and its figure must be a picture."""

from pathlib import Path

import matplotlib.image
import pytest
import torch

from mas_ext import metrics
from mas_ext.comparison.demo import COMPARED, DemoResult, learn, run_demo
from mas_ext.scenarios import split
from mas_ext.scenarios.datasets import load_dataset


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(out=tmp_path_factory.mktemp("demo") / "figure.png")


def test_fine_tuning_forgets_and_the_penalties_do_not(result: DemoResult) -> None:
    forgetting = {name: metrics.forgetting(matrix) for name, matrix in result.accuracy.items()}
    average = {name: metrics.average_accuracy(matrix) for name, matrix in result.accuracy.items()}
    # Over ten seeds fine-tuning forgot 0.046 to 0.183, the others 0.050 at most.
    assert forgetting["fine-tuning"] > 0.04
    for name in COMPARED.keys() - {"fine-tuning"}:
        assert forgetting[name] < 0.04
        assert forgetting[name] < forgetting["fine-tuning"] / 2
        assert average[name] > average["fine-tuning"]


def test_every_task_is_learned_when_its_turn_comes(result: DemoResult) -> None:
    for matrix in result.accuracy.values():
        assert matrix.shape == (5, 5)
        assert (matrix.diagonal() > 0.8).all()
        assert torch.equal(matrix.isnan(), torch.ones(5, 5, dtype=torch.bool).triu(1))


def test_table_tells_the_accuracies(result: DemoResult) -> None:
    _, titles, *rows = result.table().splitlines()
    assert titles.split() == ["0/1", "2/3", "4/5", "6/7", "8/9", "average", "forgetting"]
    for row, (name, matrix) in zip(rows, result.accuracy.items(), strict=True):
        assert row.startswith(name)
        numbers = [float(number) for number in row.removeprefix(name).split()]
        assert numbers[:5] == pytest.approx((100 * matrix[-1]).tolist(), abs=0.0501)
        assert numbers[5] == pytest.approx(sum(numbers[:5]) / 5, abs=0.1)
        assert numbers[6] == pytest.approx(100 * metrics.forgetting(matrix), abs=0.0501)


def test_figure_is_a_picture(result: DemoResult) -> None:
    pixels = matplotlib.image.imread(result.figure)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 900
    assert pixels.std() > 0.05  # lines and letters, not one colour


def test_the_seed_decides() -> None:
    scenario = split(*load_dataset("digits"))
    state = torch.random.get_rng_state()
    one, same, other = (
        learn(scenario, COMPARED["MAS"](), 1, seed, lambda: None).nan_to_num() for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_number_of_threads_is_put_back() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        learn(split(*load_dataset("digits")), COMPARED["fine-tuning"](), 1, 0, lambda: None)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_what_cannot_work_is_refused_before_learning(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"out: got 'figure\.jpg', expected the name of a \.png file"
    ):
        run_demo(out="figure.jpg")
    with pytest.raises(ValueError, match="expected a file in a folder that exists"):
        run_demo(out=tmp_path / "missing" / "figure.png")
    with pytest.raises(ValueError, match="epochs: got 0, expected a whole number from 1 up"):
        run_demo(out=tmp_path / "figure.png", epochs=0)
