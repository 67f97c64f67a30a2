"""Write a checkpoint as a diffusers pipeline that needs nothing of this repository.

    python scripts/export_pipeline.py exps/NAME my-pipeline --evaluation samples/NAME-metrics.json

Then, anywhere: DiffusionPipeline.from_pretrained("my-pipeline", custom_pipeline="my-pipeline",
trust_remote_code=True), see docs/pipeline.md. OUT holds the VAE, the EMA SiT without its
projectors, the code of the SiT and of the pipeline, and a model card (README.md).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cli


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    what = "a checkpoint, a run (its newest whole one), or OWNER/NAME[@REVISION] of the hub"
    cli.add_export_arguments(parser, what, "evaluate_fid.py --samples --out")
    args = parser.parse_args(argv)
    cli.check_output_folder("OUT", args.out, [args.checkpoint])
    return args


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the import below, which takes seconds

from utils.pipeline.export import export_pipeline
from utils.published.exporting import upload


def main(argv=None) -> None:
    args = parse_args(argv)
    given = {"evaluation": args.evaluation, "title": args.push_to_hub}
    folder = export_pipeline(args.checkpoint, args.out, **given)
    print(f"{args.out} written, the pipeline of {folder}")
    if args.push_to_hub:
        upload(args.out, args.push_to_hub)


if __name__ == "__main__":
    cli.run(main)
