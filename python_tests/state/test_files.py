"""Files: the same bits come back, a failed save keeps the old file, a damaged file is refused."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mas_ext import FusedMASPenalty
from mas_ext.importance import FisherSum
from mas_ext.state import files as checkpoint

Tensors = dict[str, Tensor]


def bits(tensors: Tensors) -> dict[str, Any]:
    """What must come back: dtype, shape and bytes."""
    found = {}
    for name, t in tensors.items():
        plain = t.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        found[name] = (t.dtype, tuple(t.shape), plain.view(torch.uint8).tolist())
    return found


def some_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return {
        **{f"a.{d}": torch.randn(3, 5, generator=generator).to(d) for d in floats},
        "bytes": torch.arange(256, dtype=torch.uint8),
        "integer": torch.tensor(2**62 + 1),
        "empty": torch.zeros(0, 3),
        "strange": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
        "strided": torch.arange(12.0).reshape(3, 4).T[::2],
        "one_of_64": torch.ones(64)[::64],
        "gradient": torch.ones(2, requires_grad=True),
    }


class Mixed(nn.Module):
    """Parameters of every dtype, one channels-last and one of size zero; y = theta x."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.image = nn.Parameter(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last))
        self.brain = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
        self.narrow = nn.Parameter(torch.randn((), dtype=torch.float16))
        self.empty = nn.Parameter(torch.zeros(0, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([p.float().sum() * x.sum(1) for p in self.parameters()], 1)


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "bfloat16": {"omega_dtype": torch.bfloat16},
    "per_task": {"store": "per_task", "omega_dtype": torch.float64, "alpha_sum": "lam"},
    "per_task_bfloat16": {"store": "per_task", "merge": "sum", "omega_dtype": torch.bfloat16},
    "uint8": {"omega_dtype": torch.uint8},
    "per_task_uint8": {"store": "per_task", "merge": "sum", "omega_dtype": torch.uint8},
    "decay": {"merge": "decay", "gamma": 0.5, "importance": "batch", "objective": "vector"},
    "own": {"anchor": "own", "exclude": ("nar*",), "backend": "reference"},
    "strength": {"strength": {"w*": 2.0, "*": 0.5}},
    "anchor_dtype": {"anchor_dtype": torch.bfloat16, "omega_dtype": torch.uint8},
    "per_task_anchor_dtype": {"anchor_dtype": torch.float16, "store": "per_task"},
    "mas-alpha": {"merge": "consistent", "anchor": "own"},
}


def held(model: nn.Module, tasks: int = 2, **settings: Any) -> FusedMASPenalty:
    """A penalty with tasks and with observations that wait."""
    penalty = FusedMASPenalty(model, lam=0.3, **settings)
    for t in range(tasks):
        penalty.consolidate([torch.rand(1, 3) + 0.5 for _ in range(2)], weight=1 + t)
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p) / 4
    penalty.observe(torch.rand(1, 3) + 0.5)
    return penalty


def small() -> tuple[nn.Module, FusedMASPenalty]:
    model = nn.Linear(3, 2)
    return model, held(model, merge="consistent")


# -- round trip ------------------------------------------------------------------------------------


def test_tensors_come_back_bit_by_bit(tmp_path: Path) -> None:
    tensors = some_tensors()
    checkpoint.save(tensors, tmp_path / "file")
    assert bits(checkpoint.load(str(tmp_path / "file"))) == bits(tensors)
    checkpoint.save({}, tmp_path / "file")
    assert checkpoint.load(tmp_path / "file") == {}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_penalty_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    model = Mixed()
    penalty = held(model, **SETTINGS[name])
    penalty.save(tmp_path / "file")
    backend = SETTINGS[name].get("backend", "auto")
    loaded = FusedMASPenalty.load(tmp_path / "file", model, backend=backend)
    assert bits(loaded.state_dict()) == bits(penalty.state_dict())
    assert bits({"value": loaded()}) == bits({"value": penalty()})
    assert (loaded.lam, loaded.num_tasks) == (0.3, 2)
    assert torch.equal(loaded.alpha, penalty.alpha)
    # The settings are the same too: both go on alike.
    for p in (penalty, loaded):
        p.consolidate()
        p.consolidate([torch.tensor([[1.0, 1.0, 1.0], [-0.5, -0.5, -0.5]])])
    assert bits(loaded.state_dict()) == bits(penalty.state_dict())
    assert penalty.num_tasks == 4


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.heads = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return torch.cat([head(h) for head in self.heads], 1)


def test_a_penalty_comes_back_while_its_model_lacks_a_head(tmp_path: Path) -> None:
    model = TwoHeads()
    penalty = held(model)
    penalty.consolidate()
    del model.heads[1]
    value = penalty()
    penalty.save(tmp_path / "file")
    loaded = FusedMASPenalty.load(tmp_path / "file", model)
    assert bits({"value": loaded()}) == bits({"value": value})
    assert bits(loaded.state_dict()) == bits(penalty.state_dict())


@pytest.mark.filterwarnings("ignore:parameter 'a.weight'. its name is now:RuntimeWarning")
def test_a_penalty_comes_back_while_a_parameter_is_excluded_by_another_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    penalty = FusedMASPenalty(model, exclude=["b.*"])
    penalty.consolidate(importance={"a.weight": torch.ones(2, 3)})
    model["b"].weight = model["a"].weight  # tied: what any of its names excludes is not held
    model.double()
    loaded = FusedMASPenalty(model, exclude=["b.*"])
    loaded.load_state_dict(penalty.state_dict())
    model["b"].weight = nn.Parameter(torch.zeros(2, 3))
    model["a"].weight.data += 1
    assert loaded().item() == penalty().item() == 6


def test_callables_are_given_again(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)

    def objective(y: Tensor) -> Tensor:
        return y.pow(4).sum(1)

    penalty = held(model, objective=objective)
    penalty.save(tmp_path / "file")
    with pytest.raises(ValueError, match="objective: got none, expected the callable"):
        FusedMASPenalty.load(tmp_path / "file", model)
    loaded = FusedMASPenalty.load(tmp_path / "file", model, objective=objective)
    for p in (penalty, loaded):
        p.consolidate()
        p.consolidate([torch.ones(2, 3)])
    assert bits(loaded.state_dict()) == bits(penalty.state_dict())


def squared(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = model(x).square()
    return output


def test_a_forward_is_given_again(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    penalty = held(model, forward=squared)
    penalty.save(tmp_path / "file")
    with pytest.raises(
        ValueError, match="forward: got none, expected squared, with which the file"
    ):
        FusedMASPenalty.load(tmp_path / "file", model)
    loaded = FusedMASPenalty.load(tmp_path / "file", model, forward=squared)
    for p in (penalty, loaded):
        p.consolidate()
        p.consolidate([torch.ones(2, 3)])
    assert bits(loaded.state_dict()) == bits(penalty.state_dict())


def test_an_estimator_that_the_file_was_not_made_with_is_refused(tmp_path: Path) -> None:
    model, penalty = small()
    penalty.save(tmp_path / "file")
    with pytest.raises(
        ValueError, match=r"importance: got FisherSum, expected none.* with 'exact'"
    ):
        FusedMASPenalty.load(tmp_path / "file", model, importance=FisherSum())


@pytest.mark.parametrize(
    ("made", "settings"),
    [
        ({"exclude": ["heads.1.*"]}, {}),
        ({"strength": {"heads.*": 0.0}}, {}),
        ({}, {"strength": {"heads.*": 0.5}}),
        ({"objective": "l1"}, {}),
        ({"forward": squared}, {}),
        ({}, {"importance": "batch"}),
        ({"merge": "decay"}, {"merge": "decay", "gamma": 0.5}),
        ({"merge": "consistent"}, {"merge": "consistent", "alpha_sum": "lam"}),
    ],
)
def test_a_state_from_other_settings_is_told_of(
    made: dict[str, Any], settings: dict[str, Any]
) -> None:
    model = TwoHeads()
    state, other = held(model, **made).state_dict(), FusedMASPenalty(model, **settings)
    (name,) = {*made, *settings} - {"merge"}
    with pytest.warns(RuntimeWarning, match=f"state: got one from a penalty with {name} .*, here"):
        other.load_state_dict(state)
    assert {n: w.tolist() for n, w in other.omega.items()} == {
        n: t[0].tolist()
        for key, t in state.items()
        for n in [key.removeprefix("omega.")]
        if n != key
    }
    FusedMASPenalty(model, **made).load_state_dict(state)  # without a warning
    del state["settings"]  # as in states of before
    other.load_state_dict(state)


def test_a_state_of_what_is_excluded_is_refused_by_name() -> None:
    model = TwoHeads()
    penalty = held(model)
    penalty.consolidate()
    state = penalty.state_dict()
    with pytest.raises(KeyError, match=r"got 'heads\.1\.weight', .*which is excluded"):
        FusedMASPenalty(model, exclude=["heads.1.*"]).load_state_dict(state)


def test_saving_changes_neither_the_tensors_nor_the_penalty(tmp_path: Path) -> None:
    _, penalty = small()
    before = bits(penalty.state_dict())
    penalty.save(tmp_path / "file")
    assert bits(penalty.state_dict()) == before
    assert os.listdir(tmp_path) == ["file"]


# -- a save that fails -----------------------------------------------------------------------------


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_a_file(_: Any, path: Any, **__: Any) -> None:
    Path(path).write_bytes(b"half")
    no_space()


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("os.replace", no_space),
        ("os.fsync", no_space),
        ("safetensors.torch.save_file", no_space),
        ("safetensors.torch.save_file", half_a_file),
    ],
)
def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(
    target: str, fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, penalty = small()
    path = tmp_path / "file"
    penalty.save(path)
    old = path.read_bytes()
    penalty.consolidate()
    with monkeypatch.context() as patch:
        patch.setattr(target, fault)
        with pytest.raises(OSError, match="No space left on device"):
            penalty.save(path)
        with pytest.raises(OSError, match="No space left on device"):
            penalty.save(tmp_path / "new")
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["file"]
    penalty.save(path)
    assert path.read_bytes() != old


def test_a_file_beyond_the_size_that_is_allowed_keeps_the_old_one(tmp_path: Path) -> None:
    """The system itself stops the writing, half-way."""
    path = tmp_path / "file"
    checkpoint.save({"a": torch.zeros(3)}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"file: could not be written \("):
            checkpoint.save({"a": torch.ones(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(checkpoint.load(path)["a"], torch.zeros(3))
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_tells_what_it_is_about_in_json(tmp_path: Path) -> None:
    for about, expected in ((None, {}), ({"x": 1}, {"x": 1})):
        checkpoint.save({"a": torch.zeros(3)}, tmp_path / "file", about)
        with safe_open(tmp_path / "file", "pt") as file:
            assert json.loads(file.metadata()["mas_ext"]) == expected


def test_ctrl_c_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save({"a": torch.zeros(3)}, tmp_path / "file")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"a": torch.ones(3)}, tmp_path / "file")
    assert torch.equal(checkpoint.load(tmp_path / "file")["a"], torch.zeros(3))
    assert os.listdir(tmp_path) == ["file"]


KILLED = """
import os, signal, sys, torch
from mas_ext.state import files as checkpoint
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save({"a": torch.ones(1000)}, sys.argv[1])
"""


def test_a_process_killed_before_it_renames_keeps_the_old_file(tmp_path: Path) -> None:
    checkpoint.save({"a": torch.zeros(1000)}, tmp_path / "file")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "file")]
    done = subprocess.run(command, cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert torch.equal(checkpoint.load(tmp_path / "file")["a"], torch.zeros(1000))
    checkpoint.save({"a": torch.ones(1000)}, tmp_path / "file")
    assert torch.equal(checkpoint.load(tmp_path / "file")["a"], torch.ones(1000))


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.save({"a": torch.zeros(3)}, tmp_path / "nowhere" / "file")


def test_others_may_read_the_file_as_the_umask_says(tmp_path: Path) -> None:
    checkpoint.save({"a": torch.zeros(3)}, tmp_path / "file")
    (tmp_path / "other").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


# -- files that are not whole ----------------------------------------------------------------------


def refused(path: Path, model: nn.Module, *errors: type[Exception]) -> str:
    """The one sentence of the error that loading gives."""
    with pytest.raises(errors or ValueError) as caught:
        FusedMASPenalty.load(path, model)
    message = str(caught.value.args[0])
    assert "got" in message or "expected" in message, message
    assert "\n" not in message
    return message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        FusedMASPenalty.load(tmp_path / "nothing.safetensors", nn.Linear(3, 2))


def test_a_truncated_or_extended_file_is_refused_at_every_length(tmp_path: Path) -> None:
    model, penalty = small()
    path = tmp_path / "file"
    penalty.save(path)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    lengths = {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) - 1}
    for content in [*(whole[:n] for n in sorted(lengths)), whole + b"\0", whole * 2]:
        path.write_bytes(content)
        assert str(path) in refused(path, model, ValueError)


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    _, penalty = small()
    path = tmp_path / "file"
    penalty.save(path)
    whole = path.read_bytes()
    for i, byte in enumerate(whole):
        path.write_bytes(whole[:i] + bytes([byte ^ 1 << i % 8]) + whole[i + 1 :])
        with pytest.raises(ValueError, match=r"file: got (a damaged file|no checksum)"):
            checkpoint.load(path)


@pytest.mark.parametrize("keep", [bytes.swapcase, lambda b: b[::-1], lambda b: bytes(len(b))])
def test_rewritten_data_is_found(keep: Callable[[bytes], bytes], tmp_path: Path) -> None:
    model, penalty = small()
    path = tmp_path / "file"
    penalty.save(path)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    path.write_bytes(whole[:header] + keep(whole[header:]))
    assert "checksum" in refused(path, model, ValueError)


class Malicious:
    """Leaves a trace where its pickle is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    model, penalty = small()
    path, trace = tmp_path / "file", tmp_path / "trace"
    torch.save(
        {**penalty.state_dict(), "x": Malicious(trace)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    assert str(path) in refused(path, model, ValueError)
    assert not trace.exists()


def test_a_safetensors_file_of_another_program_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, penalty = small()
    save_file(penalty.state_dict(), tmp_path / "file")
    assert "no checksum" in refused(tmp_path / "file", model, ValueError)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        checkpoint.load(tmp_path)


# -- whole files with wrong content ----------------------------------------------------------------


def coded(old: Tensor, **changes: Any) -> Tensor:
    """JSON in bytes with some values changed; None takes a key away."""
    content = {**json.loads(bytes(old.tolist())), **changes}
    text = json.dumps({key: v for key, v in content.items() if v is not None})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


NAN, INF = float("nan"), float("inf")
Change = Callable[[Tensors], Any]
WRONG: dict[str, tuple[Change, str]] = {
    "no_config": (lambda t: t.pop("config"), "config"),
    "no_settings": (lambda t: t.pop("settings"), "settings"),
    "no_omega": (lambda t: t.pop("omega.weight"), "weight"),
    "no_anchor": (lambda t: t.pop("anchor.weight"), "weight"),
    "no_remainder": (lambda t: t.pop("remainder.bias"), "bias"),
    "no_pending_samples": (lambda t: t.pop("pending_samples"), "pending"),
    "extra": (lambda t: t.update(color=torch.zeros(2)), "color"),
    "extra_omega": (lambda t: t.update({"omega.other": torch.zeros(1, 2)}), "other"),
    "extra_anchor": (lambda t: t.update({"anchor.other": torch.zeros(1, 2)}), "other"),
    "extra_pending": (lambda t: t.update({"pending.other": torch.zeros(2)}), "other"),
    "omega_transposed": (lambda t: t.update({"omega.weight": torch.zeros(1, 3, 2)}), "weight"),
    "omega_rows": (lambda t: t.update({"omega.weight": torch.zeros(2, 2, 3)}), "weight"),
    "anchor_flat": (lambda t: t.update({"anchor.weight": torch.zeros(6)}), "weight"),
    "remainder_vector": (lambda t: t.update({"remainder.bias": torch.zeros(1)}), "bias"),
    "pending_shape": (lambda t: t.update({"pending.bias": torch.zeros(3)}), "bias"),
    "omega_nan": (lambda t: t["omega.weight"].view(-1)[3:4].fill_(NAN), "weight"),
    "omega_negative": (lambda t: t["omega.weight"].view(-1)[3:4].fill_(-1e-9), "weight"),
    "anchor_inf": (lambda t: t["anchor.weight"].view(-1)[3:4].fill_(INF), "weight"),
    "remainder_nan": (lambda t: t["remainder.bias"].fill_(NAN), "bias"),
    "remainder_negative": (lambda t: t["remainder.bias"].fill_(-1e-9), "bias"),
    "pending_nan": (lambda t: t["pending.weight"].view(-1)[3:4].fill_(NAN), "weight"),
    "pending_negative": (lambda t: t["pending.weight"].view(-1)[3:4].fill_(-1.0), "weight"),
    "pending_objective_nan": (lambda t: t["pending_objective"].fill_(NAN), "pending"),
    "pending_samples_negative": (lambda t: t["pending_samples"].fill_(-1), "pending"),
    "omega_integer": (lambda t: t.update({"omega.bias": torch.ones(1, 2).long()}), "bias"),
    "anchor_complex": (lambda t: t.update({"anchor.bias": torch.ones(1, 2) * 1j}), "bias"),
}
WRONG_CONFIG: dict[str, dict[str, Any]] = {
    "older": {"format": 0},
    "newer": {"format": 2},
    "no_format": {"format": None},
    "other_merge": {"merge": "sum"},
    "other_anchor": {"anchor": "own"},
    "no_anchor": {"anchor": "none"},
    "of_before": {"anchor": None},
    "other_store": {"store": "per_task"},
    "no_merge": {"merge": None},
    "no_lam": {"lam": None},
    "lam_nan": {"lam": NAN},
    "lam_negative": {"lam": -1.0},
    "lam_text": {"lam": "strong"},
    "no_entries": {"entries": None},
    "entry_short": {"entries": [[1.0]]},
    "entry_text": {"entries": [["a", "b"]]},
    "entry_total_nan": {"entries": [[NAN, 1.0], [1.0, 1.0]]},
    "entry_total_zero": {"entries": [[0.0, 1.0], [1.0, 1.0]]},
    "entry_total_negative": {"entries": [[-1.0, 1.0], [1.0, 1.0]]},
    "entry_weight_inf": {"entries": [[1.0, INF], [1.0, 1.0]]},
    "entry_weight_negative": {"entries": [[1.0, -1.0], [1.0, 1.0]]},
}
WRONG_SETTINGS: dict[str, dict[str, Any]] = {
    "importance": {"importance": "fast"},
    "objective": {"objective": "l3"},
    "merge": {"merge": "mean"},
    "store": {"store": "cloud"},
    "anchor": {"anchor": "first"},
    "gamma": {"gamma": NAN},
    "alpha_sum": {"alpha_sum": "all"},
    "omega_dtype": {"omega_dtype": "float8"},
    "omega_dtype_module": {"omega_dtype": "nn"},
    "anchor_dtype": {"anchor_dtype": "float8"},
    "anchor_dtype_module": {"anchor_dtype": "nn"},
    "exclude": {"exclude": ["nothing.*"]},
    "strength": {"strength": {"nothing.*": 1.0}},
    "strength_list": {"strength": ["*"]},
    "unknown": {"color": "red"},
    "missing": {"merge": None},
}


def rewritten(path: Path, change: Change) -> nn.Module:
    """A file with a checksum that fits its content, and the model it is for."""
    model, penalty = small()
    penalty.save(path)
    tensors = checkpoint.load(path)
    change(tensors)
    checkpoint.save(tensors, path)
    return model


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tensors_are_refused_by_name(name: str, tmp_path: Path) -> None:
    change, named = WRONG[name]
    model = rewritten(tmp_path / "file", change)
    assert named in refused(tmp_path / "file", model)

    tensors = checkpoint.load(tmp_path / "file")
    if tensors.pop("settings", None) is not None:
        penalty = held(model, tasks=1, merge="consistent")
        before = bits(penalty.state_dict())
        with pytest.raises((ValueError, KeyError), match=named):
            penalty.load_state_dict(tensors)
        assert bits(penalty.state_dict()) == before, "a refused state leaves the old one"


@pytest.mark.parametrize("name", WRONG_CONFIG)
def test_a_wrong_configuration_is_refused_by_name(name: str, tmp_path: Path) -> None:
    changes = WRONG_CONFIG[name]
    model = rewritten(tmp_path / "file", lambda t: t.update(config=coded(t["config"], **changes)))
    (key,) = changes
    message = refused(tmp_path / "file", model)
    assert key in message or "config" in message


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_wrong_settings_are_refused_by_name(name: str, tmp_path: Path) -> None:
    changes = WRONG_SETTINGS[name]
    model = rewritten(
        tmp_path / "file", lambda t: t.update(settings=coded(t["settings"], **changes))
    )
    ((key, value),) = changes.items()
    message = refused(tmp_path / "file", model)
    assert key in message or str(value) in message


@pytest.mark.parametrize("key", ["config", "settings"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\xfe", b'{"format": 1}'])
def test_configuration_and_settings_that_are_no_json_object_are_refused(
    key: str, content: bytes, tmp_path: Path
) -> None:
    coded = torch.tensor(list(content), dtype=torch.uint8)
    model = rewritten(tmp_path / "file", lambda t: t.update({key: coded}))
    assert key in refused(tmp_path / "file", model)


@pytest.mark.parametrize("added", ["config", "settings"])
def test_a_newer_format_says_what_to_do(added: str, tmp_path: Path) -> None:
    """Whatever else it has that this version does not know."""

    def newer(tensors: Tensors) -> None:
        tensors["config"] = coded(tensors["config"], format=2)
        tensors[added] = coded(tensors[added], color="red")

    model = rewritten(tmp_path / "file", newer)
    assert refused(tmp_path / "file", model) == "state: got format 2, expected 1; update mas_ext"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: nn.Linear(3, 5), "weight"),
        (lambda: nn.Linear(4, 2), "weight"),
        (lambda: nn.Linear(3, 2, bias=False), "bias"),
        (lambda: nn.Sequential(nn.Linear(3, 2)), "weight"),
        (nn.Flatten, "weight"),
    ],
)
@pytest.mark.parametrize("observed", [True, False])
def test_a_model_with_other_parameters_is_refused_by_name(
    make: Callable[[], nn.Module], named: str, observed: bool, tmp_path: Path
) -> None:
    _, penalty = small()
    if not observed:
        penalty.consolidate()
    penalty.save(tmp_path / "file")
    message = refused(tmp_path / "file", make(), ValueError, KeyError)
    assert named in message.replace("'bias'", "'bias' of weight")


STRANGE: list[Any] = [
    *(None, True, -1, 0, 2, 1.5, NAN, INF, 10**400, 2**63, "x", "", "nn", "uint8", "complex64"),
    *([], [1], ["x"], [None], {}, {"a": 1}, [[1, 2, 3]], [[]], [[1, "x"]], "\ud800"),
]
RAW = [b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"1" * 5000, b'"x"', b"null", b"{}"]


def places(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in JSON, the whole included."""
    yield place
    for key in (
        node if isinstance(node, dict) else range(len(node) if isinstance(node, list) else 0)
    ):
        yield from places(node[key], (*place, key))


def put(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    content = json.loads(json.dumps(content))
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return content


def loaded_or_refused(tensors: Tensors, path: Path, model: nn.Module) -> None:
    """With a checksum that fits: a penalty that gives a number, or one of the errors that are promised."""
    checkpoint.save(tensors, path)
    with suppress(ValueError, KeyError):
        assert not FusedMASPenalty.load(path, model)().isnan()


@pytest.mark.parametrize("options", [{}, {"store": "per_task"}, {"omega_dtype": torch.uint8}])
@pytest.mark.parametrize("key", ["config", "settings"])
def test_any_value_anywhere_in_what_a_file_says_is_refused_or_right(
    key: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, path = nn.Linear(3, 2), tmp_path / "file"
    held(model, **options).save(path)
    whole = checkpoint.load(path)
    content = json.loads(bytes(whole[key].tolist()))
    wrong = [json.dumps(put(content, p, v)).encode() for p in places(content) for v in STRANGE]
    for text in [*wrong, *RAW]:
        coded = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        loaded_or_refused({**whole, key: coded}, path, model)
    for strange in (whole[key].float(), whole[key][None], whole[key] != 0, torch.tensor(7)):
        loaded_or_refused({**whole, key: strange}, path, model)


@pytest.mark.parametrize("options", [{}, {"store": "per_task"}, {"omega_dtype": torch.uint8}])
def test_any_tensor_of_a_file_that_is_another_is_refused_or_right(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model, path = nn.Linear(3, 2), tmp_path / "file"
    held(model, **options).save(path)
    whole = checkpoint.load(path)
    kinds = [
        torch.complex64,
        torch.bool,
        torch.int32,
        torch.uint8,
        torch.float16,
        torch.float8_e4m3fn,
    ]
    for name in whole.keys() - {"config", "settings"}:
        t = whole[name]
        others = [t.to(dtype) for dtype in kinds]
        others += [
            t.reshape(-1),
            t[None],
            torch.zeros(0),
            torch.zeros(1, 1, 1, 1),
            t.double() * NAN,
        ]
        others += [torch.full_like(t, -1), t.double() + 1e300, t.double() - 1e300]
        for other in others:
            loaded_or_refused({**whole, name: other}, path, model)
        loaded_or_refused({n: t for n, t in whole.items() if n != name}, path, model)
        loaded_or_refused({**whole, f"{name}.more": t}, path, model)


@pytest.mark.parametrize("text", [*RAW, b'{"tree": {"tensor": []}}', b'{"tree": {"a": 1, "b": 2}}'])
def test_a_tree_that_is_none_is_refused(text: bytes) -> None:
    coded = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    with pytest.raises(ValueError, match="state: got a 'tree'"):
        checkpoint.unpack({"tree": coded})


def test_a_tree_of_any_kind_comes_back_from_a_file(tmp_path: Path) -> None:
    leaf = torch.arange(3.0)
    tree = {
        "optimizer": {"state": {0: {"step": leaf}, 1: {"step": leaf + 1}}, "betas": (0.9, 0.99)},
        "list": [None, True, 2, 0.1, "tensor", [leaf + 2, (leaf + 3, [])]],
        "tensor": {"tensor": leaf + 4, "dict": {}},
        "float": float("inf"),
    }
    checkpoint.save(checkpoint.pack(tree), tmp_path / "tree")
    got = checkpoint.unpack(checkpoint.load(tmp_path / "tree"))

    def plain(node: Any) -> Any:
        if isinstance(node, Tensor):
            return "tensor of", node.tolist()
        if isinstance(node, dict):
            return {key: plain(item) for key, item in node.items()}
        return type(node)(map(plain, node)) if isinstance(node, (list, tuple)) else node

    assert plain(got) == plain(tree)
    assert checkpoint.unpack(checkpoint.pack(None)) is None


def test_what_is_in_no_tree_is_refused_by_its_place() -> None:
    with pytest.raises(TypeError, match="state, /a/1: got set, which can't be saved"):
        checkpoint.pack({"a": [1, {2}]})
    with pytest.raises(ValueError, match="state: got no 'tree', expected what mas_ext saved"):
        checkpoint.unpack({})
