"""What happened at which step of a run: what its config plans, and what its folder has recorded."""

from typing import NamedTuple

from utils.config.schema import Config
from utils.report.collect import Run

# letter in the charts => what it stands for
LETTERS = {
    "D": "the discriminator has trained alone",
    "G": "the GAN term begins",
    "W": "end of a warm-up",
    "R": "the run was resumed",
    "B": "rollback after numbers that were not finite",
    "X": "a step left out",
    "E": "end of the run",
}


class Event(NamedTuple):
    step: int
    letter: str
    words: str


def events_of(run: Run) -> list[Event]:
    """Every event, in the order of its steps; also planned ones that the run has not reached."""
    found = [*_planned(run.config)] if run.config else []
    for session in run.sessions:
        step = session.get("step")
        if type(step) is not int:
            continue
        if session.get("event") == "rollback":
            found.append(Event(step, "B", "rollback: went back to this step"))
        elif step > 0:
            origin = session.get("checkpoint")
            found.append(Event(step, "R", f"resumed{f' from {origin}' if origin else ''}"))
    found += [Event(step, "X", f"left out: {why}") for step, why in run.left_out]
    if run.finished:
        found.append(Event(run.steps_done, "E", "end of the run"))
    return sorted(dict.fromkeys(found))


def _planned(c: Config):
    """Where the settings change what is trained, and how."""
    joint = c.disc.pretrain_steps
    if joint and c.uses_disc:
        yield Event(joint, "D", "the discriminator has trained alone until here")
    if c.uses_disc and joint + c.loss.reg.gan_start:  # not from the first step on
        yield Event(joint + c.loss.reg.gan_start, "G", "the GAN term of the VAE begins")
    warm_ups = [("SiT", c.sit.optim.warmup_steps, joint)]
    warm_ups += [("VAE", c.vae.optim.warmup_steps, joint)] * c.vae.train
    warm_ups += [("discriminator", c.disc.optim.warmup_steps, 0)] * c.uses_disc
    for name, steps, start in warm_ups:
        if steps:
            yield Event(start + steps, "W", f"learning rate of the {name}: warm-up ends")
