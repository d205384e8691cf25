"""
Write the model card of a checkpoint from what training and evaluation recorded.

    python hub/card.py outputs/finetune --repo-id me/my-student
    python hub/card.py outputs/encoder --encoder-only
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


# Run as a script, Python puts hub/ first on the path instead of the repository
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("--encoder-only", action="store_true", help="write the card of the vision encoder alone")
    parser.add_argument("--repo-id", help="where it will be published, owner/name")
    parser.add_argument("--revision", help="tag, branch or commit that the card's code loads")
    parser.add_argument(
        "--license", help="identifier of the license, instead of the derived one; recorded for later cards"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a card that was not written here")
    given = parser.parse_args(arguments)
    from hub.card_write import write_card  # imports what takes a second

    try:
        path = write_card(
            given.checkpoint,
            encoder_only=given.encoder_only,
            repo_id=given.repo_id,
            revision=given.revision,
            license=given.license,
            overwrite=given.overwrite,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
