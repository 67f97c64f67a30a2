"""Averages of loss terms and other figures over the micro-batches of one phase."""

import torch


class MetricAverages:
    """`num` micro-batches: every `add` contributes a `num`-th to the mean of its values."""

    def __init__(self, num: int):
        self.num, self.losses, self.other = num, {}, {}

    def add_losses(self, terms: dict[str, tuple[float, torch.Tensor]]) -> torch.Tensor:
        """{name: (weight, value)} of one micro-batch => its share of the loss to differentiate."""
        self._average(self.losses, {name: value for name, (_, value) in terms.items()})
        return sum(weight * value for weight, value in terms.values()) / self.num

    def add(self, **values: torch.Tensor) -> None:
        """Average values that are logged, but are no loss."""
        self._average(self.other, values)

    def _average(self, means: dict, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            means[name] = means.get(name, 0.0) + value.detach() / self.num

    def metrics(self, phase: str) -> dict[str, torch.Tensor]:
        """{"loss/PHASE/NAME": unweighted mean, "PHASE/NAME": mean of what is no loss}."""
        losses = {f"loss/{phase}/{name}": mean for name, mean in self.losses.items()}
        return losses | {f"{phase}/{name}": mean for name, mean in self.other.items()}
