"""Write the EMA SiT and the VAE of a checkpoint as a pipeline (scripts/export_pipeline.py)."""

from pathlib import Path

from utils.pipeline.model_card import make_card, read_evaluation
from utils.pipeline.pipeline import RepaePipeline
from utils.published.exporting import new_folder, read_checkpoint_state
from utils.published.files import require_new_folder
from utils.published.model_card import read_run_settings
from utils.sampling.load import open_checkpoint
from utils.sampling.locate import locate_checkpoint
from utils.sampling.settings import SamplingSettings


def export_pipeline(
    checkpoint: str | Path, out: Path, *, evaluation: Path | None = None, title: str | None = None
) -> Path:
    """Write the folder `out`, which loads without this repository: weights, configs, code, card.

    checkpoint: whatever `locate_checkpoint` takes. evaluation: a record of `evaluate_fid.py` of
    samples from it. title: of the card; None = the name of `out`.
    Returns the folder of the checkpoint. Raises `UserError`, and leaves nothing behind, if it is
    not whole, or the record is not of its weights.
    """
    require_new_folder(out)
    folder = locate_checkpoint(checkpoint)
    state = read_checkpoint_state(folder)
    record = None
    if evaluation:
        record = read_evaluation(evaluation, open_checkpoint(folder, SamplingSettings()).weights)
    pipe = RepaePipeline.from_pretrained(folder)
    title = title or out.resolve().name
    card = make_card(title, pipe, state, read_run_settings(folder, state), record)
    with new_folder(out.resolve()) as draft:
        pipe.save_pretrained(draft)
        (draft / "README.md").write_text(card, encoding="utf-8")
    return folder
