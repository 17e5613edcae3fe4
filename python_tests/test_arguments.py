"""What is said about unknown names."""

from mas_ext._arguments import hint


def test_the_nearest_name_or_all_of_them() -> None:
    assert hint("resnet19", ["mlp", "resnet18", "cnn"]) == "did you mean 'resnet18'?"
    assert hint("vgg", iter(["mlp", "cnn"])) == "choose from mlp, cnn"
