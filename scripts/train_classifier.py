"""Train a small timm network to classify a labelled source, and save it as a local timm file.

    python scripts/train_classifier.py --network test_resnet --size 64 --out encoder.safetensors

The quickstart uses two of them on the digits: one as the frozen encoder to align with, and another
one, of another architecture and seed, as the judge of what was generated.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.errors import UserError
from utils import cli
from utils.data import open_source
from utils.draws import generator
from utils.images import pm1_to_01, u8_to_pm1


def main() -> None:
    args = parse_args()
    train_x, train_y = read_all(args.data, args.path, args.resolution, args.train_split)
    test_x, test_y = read_all(args.data, args.path, args.resolution, args.test_split)
    torch.manual_seed(args.seed)
    net = timm.create_model(args.network, num_classes=int(train_y.max()) + 1)
    judge = Classifier(net, args.size)
    start = time.perf_counter()
    fit(judge, train_x, train_y, args)
    seconds = time.perf_counter() - start
    accuracy = (judge.predict(test_x) == test_y).float().mean().item()
    facts = {"network": args.network, "size": args.size, "seed": args.seed, "accuracy": accuracy}
    save(judge, facts, args.out)
    print(f"{args.out}: {args.network}, held-out accuracy {accuracy:.1%}, {seconds:.0f} s")


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="test_resnet", help="any timm name")
    parser.add_argument("--size", type=int, default=64, help="input side in pixels")
    parser.add_argument("--data", default="digits", help="source, as data.source")
    parser.add_argument("--path", help="folder of the source, as data.path")
    parser.add_argument("--resolution", type=int, default=16, help="pixels the images come at")
    parser.add_argument("--train-split", default="train", help="digits only")
    parser.add_argument("--test-split", default="test", help="digits only")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help=".safetensors")
    return parser.parse_args()


class Classifier:
    """A timm network fed as `models.encoders` feeds it: timm's mean and std, bicubic resize."""

    def __init__(self, net: torch.nn.Module, size: int):
        self.net, self.size = net, size
        cfg = net.pretrained_cfg
        self.mean = torch.tensor(cfg["mean"]).view(1, 3, 1, 1)
        self.std = torch.tensor(cfg["std"]).view(1, 3, 1, 1)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] => (N, classes)."""
        x = (pm1_to_01(x) - self.mean) / self.std
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic")
        return self.net(x)

    @torch.no_grad()
    def predict(self, x_u8: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8 => labels (N,)."""
        self.net.eval()
        return torch.cat([self.logits(u8_to_pm1(x)).argmax(dim=1) for x in x_u8.split(256)])


def read_all(name: str, path: str | None, resolution: int, split: str):
    """A whole (small) source: images (N, 3, H, W) uint8 and labels (N,)."""
    source = open_source(name, path, resolution, split)
    images, labels = zip(*(source[i] for i in range(len(source))))
    return torch.stack(images), torch.tensor(labels)


def fit(judge: Classifier, x_u8: torch.Tensor, y: torch.Tensor, args: argparse.Namespace) -> None:
    """AdamW with a linear decay to zero, label smoothing, random small affine maps."""
    opt = torch.optim.AdamW(judge.net.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        opt, args.lr, total_steps=args.steps, pct_start=0.1, anneal_strategy="linear"
    )
    g = generator("classifier", args.seed)
    judge.net.train()
    for _ in range(args.steps):
        chosen = torch.randint(len(y), (args.batch_size,), generator=g)
        logits = judge.logits(jitter(u8_to_pm1(x_u8[chosen]), g))
        loss = F.cross_entropy(logits, y[chosen], label_smoothing=0.1)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()


def jitter(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Rotate by up to 14 degrees, scale by up to 15 %, shift by up to an eighth; black outside."""
    num = len(x)
    angle = (torch.rand(num, generator=g) - 0.5) * 0.5
    scale = 1 + (torch.rand(num, generator=g) - 0.5) * 0.3
    shift = (torch.rand(num, 2, generator=g) - 0.5) * 0.25
    cos, sin = angle.cos() * scale, angle.sin() * scale
    top, bottom = torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)
    field = F.affine_grid(torch.stack([top, bottom], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, field, align_corners=False) - 1  # black is -1, padding 0


def save(judge: Classifier, facts: dict, path: Path) -> None:
    """A timm state dict, head included; the facts travel in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(judge.net.state_dict(), path, metadata={"classifier": json.dumps(facts)})


def load(path: Path) -> tuple[Classifier, dict]:
    """A file of `save`: the classifier and its facts (network, size, seed, accuracy)."""
    if not path.is_file():
        raise UserError(f"no classifier at {path}: train one with scripts/train_classifier.py")
    with safe_open(path, "pt") as file:
        facts = json.loads((file.metadata() or {}).get("classifier", "null"))
    if facts is None:
        raise UserError(f"{path} was not made by scripts/train_classifier.py")
    state = load_file(path)
    net = timm.create_model(facts["network"], num_classes=num_classes(state, facts["network"]))
    net.load_state_dict(state)
    return Classifier(net, facts["size"]), facts


def num_classes(state: dict[str, torch.Tensor], network: str) -> int:
    head = timm.get_pretrained_cfg(network).classifier
    return len(state[f"{head}.bias"])


if __name__ == "__main__":
    cli.run(main)
