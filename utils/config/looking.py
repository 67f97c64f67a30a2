"""The settings of what looks at a run while it trains: pictures, metrics. Read with schema.py."""

from dataclasses import dataclass, field

from utils.config.fields import MOST_STEPS, choice, path_or
from utils.records import number
from utils.samplers import SOLVERS


@dataclass
class PreviewConfig:
    """Pictures during training: samples of the EMA weights, otherwise at the defaults of
    utils/sampling/settings.py, and reconstructions."""

    # Number of steps between two previews. 0 = none.
    every: int = number(10_000, at_least=0, at_most=MOST_STEPS)
    # Number of images. Their noise and labels are the same in every preview.
    num: int = number(64, at_least=1, at_most=10_000)
    # Solver (utils/samplers.py).
    solver: str = choice("ode-ab2", SOLVERS)
    # Number of steps of the solver.
    steps: int = number(50, at_least=1, at_most=10_000)
    # Scale of classifier-free guidance. 1 = no guidance.
    cfg_scale: float = number(2.0, at_least=0, at_most=1000)


@dataclass
class EvalConfig:
    """Evaluations of the EMA weights during training, as by evaluate_fid.py, of samples otherwise
    at the defaults of utils/sampling/settings.py."""

    # Number of steps between two evaluations. 0 = none.
    every: int = number(0, at_least=0, at_most=MOST_STEPS)
    # Number of generated images. It is part of each metric's name: few images, larger distance.
    num: int = number(1000, at_least=1, at_most=10**6)
    # Reference images or statistics, as in evaluate_fid.py --reference. null = training images.
    reference: str | None = path_or(None, r"\w+:")
    # Network whose features are compared: inception, dinov2, timm:NAME[@FILE] or pixel.
    features: str = path_or("inception", "[^@]*@")
    # Weight file of inception or dinov2. null = the usual place.
    weights: str | None = path_or(None)
    # Names of metrics (utils/evaluation/metrics.py).
    metrics: list[str] = field(default_factory=lambda: ["fid"])
    # Images per rank and network call.
    batch_size: int = number(50, at_least=1, at_most=10**5)
    # Solver (utils/samplers.py).
    solver: str = choice("ode-ab2", SOLVERS)
    # Number of steps of the solver.
    steps: int = number(50, at_least=1, at_most=10_000)
    # Scale of classifier-free guidance. 1 = no guidance.
    cfg_scale: float = number(1.0, at_least=0, at_most=1000)
