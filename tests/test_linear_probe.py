import torch

from detok_pipe.evaluation.linear_probe import LinearProbe


def clusters(rows: int, spread: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(4, 32) * 5
    labels = torch.arange(rows) % 4
    return centres[labels] + spread * torch.randn(rows, 32, generator=generator), labels


def test_separable_classes_are_recognised_on_new_rows():
    probe = LinearProbe.fit(*clusters(200, 0.5, 0))
    assert probe.accuracy(*clusters(200, 0.5, 1)) == 1.0


def test_features_without_a_class_are_at_chance():
    probe = LinearProbe.fit(*clusters(400, 0.5, 0))
    features, labels = clusters(400, 0.5, 1)
    shuffled = labels[torch.randperm(400, generator=torch.Generator().manual_seed(2))]
    assert abs(probe.accuracy(features, shuffled) - 0.25) < 0.08


def test_fewer_rows_than_dimensions_and_a_constant_feature_are_fine():
    features, labels = clusters(16, 0.5, 0)
    features[:, 31] = 1.0
    assert LinearProbe.fit(features, labels).accuracy(features, labels) == 1.0
