"""Networks against their formulas, written out by hand."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from image_files import SHARED
from torch import nn
from torch.nn import functional as F

from mas_ext import models


def with_heads(model: models.MultiHead, *classes: int) -> models.MultiHead:
    for count in classes:
        model.add_head(count)
    return model


def test_forward_is_the_formula() -> None:
    model = with_heads(models.mlp((1, 3, 4), hidden=(7, 5)), 2, 3)
    x = torch.randn(4, 1, 3, 4)
    weight_1, bias_1, weight_2, bias_2 = model.backbone.parameters()
    hidden = (x.reshape(4, 12) @ weight_1.T + bias_1).clamp(min=0)
    hidden = (hidden @ weight_2.T + bias_2).clamp(min=0)
    logits = [hidden @ head.weight.T + head.bias for head in model.heads]
    assert [each.shape for each in logits] == [(4, 2), (4, 3)]
    torch.testing.assert_close(model(x, 0), logits[0])
    torch.testing.assert_close(model(x, 1), logits[1])
    torch.testing.assert_close(model(x), torch.cat(logits, dim=1))


def test_a_task_trains_the_backbone_and_its_own_head_only() -> None:
    model = with_heads(models.mlp((6,), hidden=(5,)), 2, 2, 2)
    model(torch.randn(3, 6), 1).square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"backbone.1.weight", "backbone.1.bias", "heads.1.weight", "heads.1.bias"}


def test_without_hidden_layers_it_is_linear() -> None:
    model = with_heads(models.mlp((2, 3), hidden=()), 2)
    x = torch.randn(3, 2, 3)
    head = model.heads[0]
    torch.testing.assert_close(model(x, 0), x.reshape(3, 6) @ head.weight.T + head.bias)


def test_a_head_is_what_the_backbone_is() -> None:
    model = models.MultiHead(nn.Linear(3, 4, dtype=torch.float64, device="meta"), width=4)
    model.add_head(2)
    assert model.heads[0].weight.dtype == torch.float64
    assert model.heads[0].weight.device.type == "meta"
    assert model.heads[0].weight.shape == (2, 4)


def test_a_seed_gives_the_same_head_whatever_the_default_device_is() -> None:
    found = []
    for default in ("cpu", "meta"):
        model = models.MultiHead(nn.Linear(3, 4), width=4)
        torch.manual_seed(0)
        with torch.device(default):
            model.add_head(2)
        found.append(model.heads[0].weight)
    assert torch.equal(found[0], found[1])


def test_heads_that_cannot_be() -> None:
    model = models.mlp((3,), hidden=(4,))
    with pytest.raises(ValueError, match="model: got no head, expected at least one"):
        model(torch.randn(1, 3))
    with pytest.raises(ValueError, match="classes: got 0, expected a whole number from 1 up"):
        model.add_head(0)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "width", "parameters"),
    [
        ("mlp", (1, 8, 8), 400, 64 * 400 + 400 + 400 * 400 + 400),
        # By hand: 9 weights a pair of channels, and biases; then 128 x 3 x 3 -> 256.
        ("cnn", (1, 28, 28), 256, 288 + 9216 + 18432 + 36864 + 73728 + 147456 + 448 + 295168),
        # The paper's, on 32 x 32: 64 x 3 x 16 + 64, 128 x 64 x 9 + 128, 256 x 128 x 4 + 256, and
        # 1024 -> 2048 -> 2048.
        ("alexnet", (3, 32, 32), 2048, 3136 + 73856 + 131328 + 2099200 + 4196352),
        # The same on 28 x 28, where they are 3 x 3, 2 x 2 and 2 x 2 of one channel.
        ("alexnet", (1, 28, 28), 2048, 640 + 32896 + 131328 + 2099200 + 4196352),
        # torchvision's 11,689,512, less its 512,000 + 1,000 at the end and 64 x 3 x (49 - 9).
        ("resnet18", (3, 32, 32), 512, 11_689_512 - 513_000 - 7_680),
        # The paper's 0.27 and 0.46 million, less the 650 of ten outputs.
        ("resnet20", (3, 32, 32), 64, 269_722 - 650),
        ("resnet32", (3, 32, 32), 64, 464_154 - 650),
    ],
)
def test_networks_are_of_the_published_sizes(
    name: str, shape: tuple[int, ...], width: int, parameters: int
) -> None:
    model = models.build(name, shape)
    assert len(model.heads) == 0
    assert model.width == width
    assert count(model) == parameters
    assert with_heads(model, 3)(torch.rand(2, *shape), 0).shape == (2, 3)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 28, 28), (2, 24, 40)])
@pytest.mark.parametrize("name", models.MODELS)
def test_networks_take_images_of_any_shape(name: str, shape: tuple[int, ...]) -> None:
    model = with_heads(models.build(name, shape), 2).eval()
    x = torch.rand(2, *shape)
    logits = model(x)
    assert logits.shape == (2, 2)
    # Each image for itself, and each matters.
    torch.testing.assert_close(model(x[1:]), logits[1:], rtol=1e-4, atol=1e-5)
    assert not torch.equal(logits[0], logits[1])


def test_networks_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="name: got 'resnet19', did you mean 'resnet18'"):
        models.build("resnet19", (3, 32, 32))
    for name, shape, least in (
        ("cnn", (1, 7, 28), 8),
        ("alexnet", (3, 32, 19), 20),
        ("resnet20", (784,), 1),
    ):
        with pytest.raises(
            ValueError, match=rf"shape: got \({shape[0]}.*with sides of at least {least}$"
        ):
            models.build(name, shape)


def residual(x: torch.Tensor, block: nn.Module, stride: int, width: int) -> torch.Tensor:
    """A block in eval mode by the paper's formula, shortcut A."""

    def convolved(x: torch.Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, stride: int):
        x = F.conv2d(x, conv.weight, stride=stride, padding=1)
        shape = (1, -1, 1, 1)
        x = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + 1e-5).sqrt()
        return x * norm.weight.view(shape) + norm.bias.view(shape)

    y = convolved(x, block.conv1, block.bn1, stride).clamp(min=0)
    y = convolved(y, block.conv2, block.bn2, 1)
    way = torch.zeros(len(x), width, *y.shape[2:], dtype=x.dtype)
    start = (width - x.shape[1]) // 2
    way[:, start : start + x.shape[1]] = x[:, :, ::stride, ::stride]
    return (y + way).clamp(min=0)


def test_resnet20_is_the_formula() -> None:
    model = with_heads(models.resnet20((3, 10, 10)), 4).double()
    model(torch.randn(8, 3, 10, 10).double())  # so that its statistics are its own
    model.eval()
    body, x = model.backbone, torch.randn(2, 3, 10, 10).double()
    features = body.relu(body.bn1(body.conv1(x)))
    for layer, stride, width in ((body.layer1, 1, 16), (body.layer2, 2, 32), (body.layer3, 2, 64)):
        assert len(layer) == 3
        for block in layer:
            features = residual(features, block, stride, width)
            stride = 1
    torch.testing.assert_close(body(x), features.mean((2, 3)))


# Any network as a backbone


def user_network() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU()),
        nn.Sequential(nn.Tanh(), nn.Linear(5, 4)),
    )


def test_the_last_layer_of_any_network_becomes_heads() -> None:
    network, x = user_network(), torch.randn(3, 6)
    features, logits = network[0](x).tanh(), network(x)
    old = network[1][1]
    model = models.with_heads(network, head="1.1")
    assert model.width == 5
    torch.testing.assert_close(model.backbone(x), features)
    model.add_head(4)
    model.heads[0].load_state_dict(old.state_dict())
    torch.testing.assert_close(model(x, 0), logits)


def test_layers_that_cannot_be_heads() -> None:
    network = user_network()
    before = str(network)
    for head, got in (
        (
            "fc",
            "'fc', nothing of that name, expected the name of an nn.Linear; choose from 0.1, 1.1",
        ),
        (
            "1.2",
            "'1.2', nothing of that name, expected the name of an nn.Linear; did you mean '1.1'",
        ),
        ("1", "'1', a layer of type Sequential"),
        ("1.0", "'1.0', a layer of type Tanh"),
        ("", "'', nothing of that name"),
    ):
        with pytest.raises(ValueError, match=f"head: got {got}"):
            models.with_heads(network, head)
    assert str(network) == before
    with pytest.raises(ValueError, match=r"the module has no nn\.Linear"):
        models.with_heads(nn.Sequential(nn.ReLU()))


# Weights from files


def weights(prefix: str = "", head: str = "linear") -> dict[str, torch.Tensor]:
    """A trained resnet20 with one head, as it would be saved by others."""
    source = models.resnet20((3, 8, 8))
    source.backbone(torch.randn(4, 3, 8, 8))
    state = {**source.backbone.state_dict(), f"{head}.weight": torch.randn(10, 64)}
    return {prefix + name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("kind", ["safetensors", "pt", "wrapped"])
def test_weights_of_any_kind_of_file(tmp_path: Path, prefix: str, kind: str) -> None:
    state = weights(prefix)
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if kind == "wrapped" else state, path)
    model = models.resnet20((3, 8, 8))
    assert models.load_backbone(model, path) == ["linear.weight"]
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, state[prefix + name])


def test_weights_of_a_multi_head(tmp_path: Path) -> None:
    source, model = (models.mlp((6,), hidden=(4,)) for _ in range(2))
    with_heads(source, 2, 3)
    with_heads(model, 5)
    head = model.heads[0].weight.clone()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    left = models.load_backbone(model, tmp_path / "weights.pt")
    assert left == ["heads.0.bias", "heads.0.weight", "heads.1.bias", "heads.1.weight"]
    x = torch.randn(2, 6)
    assert torch.equal(model.backbone(x), source.backbone(x))
    assert torch.equal(model.heads[0].weight, head)


def test_counts_of_batches_may_be_missing(tmp_path: Path) -> None:
    state = {name: t for name, t in weights().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "weights.pt")
    model = models.resnet20((3, 8, 8))
    models.load_backbone(model, tmp_path / "weights.pt")
    assert torch.equal(model.backbone.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"bn1.bias": None, "conv1.weight": None}, r"got no 'conv1.weight' \(and 1 others missing"),
        (
            {"bn1.bias": torch.ones(17)},
            r"got 'bn1.bias' .*, expected torch.float32 of shape \(16,\)",
        ),
        (
            {"bn1.bias": torch.ones(16, dtype=torch.int8)},
            "got 'bn1.bias' as torch.int8 .*expected torch.float32",
        ),
        (
            {"layer4.0.bn1.bias": torch.ones(1)},
            "got 2 layers .*, layer4.0.bn1, linear, expected one",
        ),
        ({"epoch": 3}, "got int as 'epoch', expected a dict of tensors"),
    ],
    ids=["missing", "shape", "dtype", "another network", "no tensor"],
)
def test_weights_that_do_not_fit(tmp_path: Path, changed: dict, expected: str) -> None:
    path = tmp_path / "weights.pt"
    state = {**weights(), **changed}
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    model = models.resnet20((3, 8, 8))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"^{path}: .*{expected}"):
        models.load_backbone(model, path)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class Bomb:
    """What an evil pickle does when it is read."""

    def __reduce__(self) -> tuple:
        return pytest.fail, ("the file was unpickled",)


def test_broken_and_evil_files_of_weights(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    packed = safetensors.torch.save(weights())
    for name, content in (
        ("evil.pt", pickle.dumps(Bomb())),
        ("empty.pt", b""),
        ("cut.pt", whole[: len(whole) // 2]),
        ("cut.safetensors", packed[:-1]),
        ("empty.safetensors", b""),
        ("html.safetensors", b"<!DOCTYPE html>"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path}: got a damaged file, or one with code"):
            models.load_backbone(models.resnet20((3, 8, 8)), path)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(
        ValueError, match="got list as 'the whole file', expected a dict of tensors"
    ):
        models.load_backbone(models.resnet20((3, 8, 8)), tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError):
        models.load_backbone(models.resnet20((3, 8, 8)), tmp_path / "missing.pt")


# Real weights and images, where they are at hand. Defined conditionally, so that none is skipped.

if (SHARED / "resnet20_cifar10.th").is_file():

    def test_a_real_resnet20_recognises_real_images() -> None:
        """Trained by Y. Idelbayev: 91.7 % on all of CIFAR-10's test images; here on a thousand."""
        path = SHARED / "resnet20_cifar10.th"
        model = models.build("resnet20", (3, 32, 32))
        assert models.load_backbone(model, path) == ["linear.bias", "linear.weight"]
        model.add_head(10)
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        for name, parameter in model.heads[0].named_parameters():
            parameter.data.copy_(state[f"module.linear.{name}"])
        images = np.load(SHARED / "cifar10_test1k.npz", allow_pickle=False)
        x = torch.tensor(images["x_test"]).permute(0, 3, 1, 2) / 255
        mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(
            2, 3, 1, 1
        )
        with torch.no_grad():
            logits = model.eval()((x - mean) / deviation, 0)
        right = (logits.argmax(1) == torch.tensor(images["y_test"]).long()).double().mean()
        assert float(right) == pytest.approx(0.917, abs=0.005)


def test_statistics_that_are_kept() -> None:
    """In training, BatchNorm normalises by its running statistics and leaves them; dropout is as it was."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()
    model = models.MultiHead(nn.Sequential(*layers), 4)
    layers[1].running_mean.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    model.keep_statistics = True
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(6, 3)
    assert model.train() is model
    assert layers[2].training
    normalised = nn.Sequential(*layers[:2])(x)
    torch.testing.assert_close(
        normalised, (layers[0](x) - layers[1].running_mean) / (1 + 1e-5) ** 0.5
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    copied = copy.deepcopy(model)
    assert not copied.train().backbone[1].training

    model.keep_statistics = False
    model.train().backbone(x)
    assert not torch.equal(layers[1].running_mean, before["backbone.1.running_mean"])
