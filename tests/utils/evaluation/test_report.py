"""What numbers are called, and which may stand in a table with published ones."""

from tests.utils.evaluation.toy_network import toy_net
from utils.evaluation.metrics import METRICS, VAE_METRICS
from utils.evaluation.report import metric_name, scalars


def test_names_follow_network_count_and_metric():
    inception, dino = toy_net(published=True), toy_net(published=True, family="dinov2")
    assert metric_name(METRICS["fid"], inception, 50_000) == "gFID-50K"
    assert metric_name(METRICS["sfid"], inception, 50_000) == "sFID-50K"
    assert metric_name(VAE_METRICS["rfid"].features, inception, 50_000) == "rFID-50K"
    assert metric_name(METRICS["precision"], inception, 50_000) == "precision"
    assert metric_name(METRICS["fid"], inception, 1000) == "FID@1000"
    assert metric_name(METRICS["is"], inception, 1000) == "IS@1000"
    assert metric_name(METRICS["fid"], dino, 1000) == "FD-DINOv2@1000"
    assert metric_name(METRICS["precision"], dino, 1000) == "precision[toy]"
    assert metric_name(METRICS["fid"], toy_net(), 50_000) == "FD[toy]"


def test_scalars_for_logs_carry_the_number_of_images():
    record = {
        "n": 1000,
        "metrics": {"FD[timm:x@y.pth#ab]": 2.0, "FID@1000": 3.0, "precision@1000": 1.0},
        "details": {"FD[timm:x@y.pth#ab]": {"times_floor": 4.0}},
    }
    assert scalars(record) == {
        "FD-1k[timm:x@y.pth#ab]": 2.0,
        "FD-1k[timm:x@y.pth#ab]/floor": 4.0,
        "FID-1k": 3.0,
        "precision-1k": 1.0,
    }
