"""The results of the digits study as Markdown and as a plot."""

from pathlib import Path
from statistics import fmean

ARMS = {  # file in configs/digits => name; the slow ones first, so that no core waits at the end
    "repae": "REPA-E",
    "naive": "naive end-to-end",
    "no-latent-norm": "REPA-E, no latent norm",
    "repa": "REPA",
    "sit": "SiT",
}
METRICS = {  # of one checkpoint => title, and the scale of its axis
    "fd": ("Frechet distance to the training digits", "log"),
    "label_accuracy": ("label accuracy of 1,000 samples", "linear"),
    "spatial_variance": ("spatial variance of the latents", "log"),
    "total_variation": ("total variation of the latents", "log"),
}

Measurements = dict[str, dict[str, float]]  # of one run: step => metric => value
Results = dict[str, dict[int, Measurements]]  # arm => seed => measurements


def markdown(results: Results) -> str:
    """All figures at the last step, and two of them at every step: the mean over seeds, and in
    brackets each seed."""
    head = ["arm", "Frechet distance", "label accuracy", "spatial variance", "total variation"]
    names = [*METRICS, "psnr"]
    steps = list(next(iter(next(iter(results.values())).values())))
    rows = [[cell(runs, steps[-1], name) for name in names] for runs in results.values()]
    pages = [table([*head, "PSNR of the VAE, dB"], results, rows)]
    for name in ("fd", "label_accuracy"):
        rows = [[cell(runs, step, name) for step in steps] for runs in results.values()]
        pages.append(table([f"{METRICS[name][0]}, step", *steps], results, rows))
    return "\n".join(pages)


def table(head: list[str], results: Results, rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([ARMS[arm], *row] for arm, row in zip(results, rows))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(runs: dict[int, Measurements], step: str, name: str) -> str:
    """The mean over seeds, and in brackets each seed; a single seed alone."""
    values = [run[step][name] for run in runs.values()]
    each = ", ".join(map(three_digits, values))
    return f"{three_digits(fmean(values))} ({each})" if len(values) > 1 else each


def three_digits(value: float) -> str:
    """With the zeros at its end: 0.970, 4.70, 120."""
    return f"{value:#.3g}".rstrip(".")


def plot(results: Results, path: Path) -> None:
    """Every metric over steps: the mean over seeds as a line, their range as a band."""
    # not needed by the processes that train and measure
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    from utils.pictures.grid import save_figure

    figure = Figure(figsize=(4.2 * len(METRICS), 3.6), layout="constrained")
    axes = figure.subplots(1, len(METRICS))
    for axis, (name, (title, scale)) in zip(axes, METRICS.items()):
        for arm, runs in results.items():
            steps = sorted(map(int, next(iter(runs.values()))))
            values = [[run[str(step)][name] for run in runs.values()] for step in steps]
            (line,) = axis.plot(steps, [fmean(v) for v in values], ".-", label=ARMS[arm])
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
        axis.set(title=title, xlabel="step", yscale=scale)
        if scale == "log":
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(ARMS), frameon=False)
    save_figure(figure, path, dpi=100)
