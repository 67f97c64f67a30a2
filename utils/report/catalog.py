"""What the metrics of a run are: the group, title, unit and meaning of each name.

A name that is in no row is shown all the same, as what it is, in the last group.
"""

import re
from typing import NamedTuple

# group => what is said above its charts, in the order of the page
GROUPS = {
    "Evaluation": "Measured during training on samples that the averaged SiT (EMA) draws.",
    "VAE": "The autoencoder turns an image into a small latent and back. These are the terms of "
    "its loss, each before its weight, and what becomes of its latents.",
    "SiT": "The diffusion transformer learns to turn noise into latents.",
    "Discriminator": "A network that learns to tell images from their reconstructions; the VAE "
    "learns to deceive it, which keeps reconstructions sharp.",
    "Gradient norms": "How strongly each network is pulled, before clipping. Spikes are normal; a "
    "steady rise is an early sign of trouble.",
    "Learning rate": "The step size of each optimizer; 0 where a network does not move yet.",
    "Throughput": "How fast the run was, without pictures, evaluations and checkpoints.",
    "Memory": "Of the GPU of the main process.",
    "Numbers that were not finite": "Updates that were left out, and the loss scales of fp16.",
    "Warnings": "A point at the step at which a warning was given; each is given once.",
    "Others": "Metrics that this page has no words for.",
}
LOWER, HIGHER = "lower is better", "higher is better"
NETWORKS = {"vae": "VAE", "sit": "SiT", "disc": "discriminator"}


class Kind(NamedTuple):
    """What is said about a metric. `{0}`, `{1}`: parts of its name; `better`: which way is good."""

    group: str
    title: str
    unit: str = ""
    says: str = ""
    better: str = ""


# pattern of the whole name => what it is; the first that fits
KINDS: dict[str, Kind] = {
    r"loss/vae/pixel": Kind(
        "VAE", "Pixel error of reconstructions", "{pixel} of values in [-1, 1]",
        "How far a reconstructed image is from the original, pixel by pixel.", LOWER),
    r"loss/vae/lpips": Kind(
        "VAE", "Perceptual error (LPIPS)", "LPIPS distance",
        "How different a reconstruction looks to a network that judges like a person; 0 is equal.",
        LOWER),
    r"loss/vae/kl": Kind(
        "VAE", "KL divergence of the latents", "nats per image",
        "How far latents are from standard noise. Its weight is tiny: a rise is no harm in itself.",
    ),
    r"loss/vae/gan": Kind(
        "VAE", "GAN term of the VAE", "minus the discriminator's logit",
        "High: the discriminator recognises reconstructions; below 0: it takes them for real."),
    r"loss/vae/align": Kind(
        "VAE", "Alignment seen by the VAE", "minus cosine similarity",
        "How well hidden features of the SiT agree with those of a pretrained vision encoder; -1 "
        "is perfect. In REPA-E this term alone lets the SiT shape the VAE.", LOWER),
    r"loss/vae/diffusion": Kind(
        "VAE", "Diffusion loss in the VAE", "squared error of the velocity",
        "Only in naive end-to-end training: it makes latents simple until they collapse.", LOWER),
    r"vae/latent_variance": Kind(
        "VAE", "Spatial variance of the latents", "variance within a latent",
        "How much a latent varies over the image. A fall towards 0 is the collapse of latents."),
    r"loss/sit/diffusion": Kind(
        "SiT", "Diffusion loss", "squared error of the velocity",
        "How well the SiT predicts the way from noise to a latent. Values of two runs are "
        "comparable only if their latents are.", LOWER),
    r"loss/sit/align": Kind(
        "SiT", "Alignment loss (REPA)", "minus cosine similarity",
        "How well hidden features of the SiT agree with those of a pretrained vision encoder; -1 "
        "is perfect.", LOWER),
    r"loss/disc/hinge": Kind(
        "Discriminator", "Hinge loss", "1 = tells nothing apart, 0 = tells all apart",
        "Between the two it gives the VAE something to learn from; stuck at 1 or 0 it does not."),
    r"loss/disc/lecam": Kind(
        "Discriminator", "LeCam regularisation", "squared logits",
        "Keeps the judgements about real and reconstructed images near each other."),
    r"disc/logits_real": Kind(
        "Discriminator", "Judgement of real images", "mean logit",
        "Above 0: taken for real. It should lie above that of reconstructions."),
    r"disc/logits_fake": Kind(
        "Discriminator", "Judgement of reconstructions", "mean logit",
        "Below 0: recognised. Equal to that of real images: the discriminator tells nothing."),
    r"grad_norm/(.+)": Kind("Gradient norms", "Gradient norm: {0}", "L2 norm before clipping"),
    r"lr/(.+)": Kind("Learning rate", "Learning rate: {0}", "AdamW's step size"),
    r"images_per_second": Kind(
        "Throughput", "Training speed", "images per second", "All ranks together.", HIGHER),
    r"seconds_waiting_for_data": Kind(
        "Throughput", "Waiting for data", "seconds per step",
        "Time in which the main process had nothing to train on. On a GPU it is an upper bound.",
        LOWER),
    r"peak_memory_gib": Kind(
        "Memory", "Peak memory", "GiB", "The most that tensors took since the last log line."),
    r"skipped/(.+)": Kind(
        "Numbers that were not finite", "Updates left out: {0}", "count since the start"),
    r"loss_scale/(.+)": Kind(
        "Numbers that were not finite", "Loss scale: {0}", "factor",
        "fp16 doubles it now and then and halves it when numbers overflow."),
    r"warning/ema_reach": Kind(
        "Warnings", "The EMA reaches back too far", "steps that the EMA averages",
        "It averages more steps than the run has: samples show the random start. Set "
        "ema.warmup=true, or a smaller ema.decay."),
    r"warning/latent_variance": Kind(
        "Warnings", "The latents collapse", "share of the variance at the start",
        "See loss.diffusion.vae, loss.align.vae and vae.optim.lr."),
    r"warning/discriminator_hinge": Kind(
        "Warnings", "The discriminator is saturated", "hinge loss",
        "It tells all apart or nothing, so that the VAE learns nothing from it. See loss.reg.gan "
        "and disc.optim.lr."),
    r"warning/(.+)": Kind("Warnings", "Warning: {0}"),
    r"eval/(?=[gs]?FI?D\b)(.+)(?<!/floor)": Kind(
        "Evaluation", "{0}", "Frechet distance",
        "Distance between generated and reference images as a network sees them. The fewer the "
        "images, the larger it is: compare equal numbers only.", LOWER),
    r"eval/(.+)/floor": Kind(
        "Evaluation", "{0}, in multiples of its floor", "times the floor",
        "1 would be as near as two halves of the reference images are to each other.", LOWER),
    r"eval/(IS\b.*)": Kind(
        "Evaluation", "{0}", "Inception score",
        "Whether samples show recognisable and varied things.", HIGHER),
    r"eval/(precision\b.*)": Kind(
        "Evaluation", "{0}", "share of samples",
        "Samples that look like reference images: fidelity.", HIGHER),
    r"eval/(recall\b.*)": Kind(
        "Evaluation", "{0}", "share of reference images",
        "Reference images that the samples come near to: variety.", HIGHER),
    r"eval/(.+)": Kind("Evaluation", "{0}"),
}  # fmt: skip


def kind_of(name: str, pixel_kind: str = "l1") -> Kind:
    """What the metric `name` is; `pixel_kind`: loss.reg.pixel_kind of the run."""
    pixel = {"l1": "mean absolute difference", "mse": "mean squared difference"}
    for pattern, kind in KINDS.items():
        if match := re.fullmatch(pattern, name):
            parts = [NETWORKS.get(part, part) for part in match.groups()]
            title = kind.title.replace("{0}", parts[0]) if parts else kind.title
            unit = kind.unit.replace("{pixel}", pixel.get(pixel_kind, "difference"))
            return kind._replace(title=title, unit=unit)
    return Kind("Others", name)


def grouped(names: list[str]) -> dict[str, list[str]]:
    """The names by group, groups in their order, names in that of `KINDS`, then as they came."""
    patterns = list(KINDS)

    def place(name: str) -> int:
        fits = (i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, name))
        return next(fits, len(patterns))

    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in sorted(names, key=place):
        groups[kind_of(name).group].append(name)
    return {group: members for group, members in groups.items() if members}
