"""The two files of code that an exported folder holds, made of this repository's own."""

from functools import cache

from utils.pipeline.bundle import ROOT, bundle
from utils.provenance import git_commit

ORIGIN = """\
{summary}

scripts/export_pipeline.py of the REPA-E repository put this file together. It holds parts of that
repository as they are written there: change them there, and export again.
Made of {commit}.

{licence}"""


@cache
def pipeline_source() -> str:
    """pipeline.py: RepaePipeline and what it needs, without loading."""
    summary = "RepaePipeline: class-conditional images of a SiT and a VAE, for diffusers."
    return bundle(["utils.pipeline.standalone.RepaePipeline"], origin(summary))


@cache
def sit_source() -> str:
    """sit_ema/sit.py: SiT and what it needs."""
    return bundle(["models.sit.SiT"], origin("SiT, the velocity network of the pipeline."))


def origin(summary: str) -> str:
    """The docstring: what a file is, where it comes from, and the licence."""
    commit, licence = git_commit(), (ROOT / "LICENSE").read_text(encoding="utf-8")
    said = f"commit {commit}" if commit else "outside of git"
    return ORIGIN.format(summary=summary, commit=said, licence=licence.strip())
