"""
Export a MoVE-KD checkpoint, or its encoder, for use elsewhere.

    python hub/export.py CHECKPOINT DEST --form encoder                  # the distilled encoder alone
    python hub/export.py CHECKPOINT DEST --form onnx
    python hub/export.py CHECKPOINT DEST --form merged --images photos/  # no experts, with an error that is measured
    python hub/export.py DEST PLAIN --form clip                          # then plain CLIP, or a stock LLaVA

Forms:

- `encoder`: `AutoModel.from_pretrained(DEST, trust_remote_code=True)` and `AutoImageProcessor.from_pretrained(DEST)`.
- `dense`: the encoder with `dense_routing`: every expert serves every token, weighed by the router's probability,
  instead of the best alone. For a model that was trained with top-1 routing the outputs are others; by how much is
  measured on the images given.
- `clip`: plain CLIP as transformers 4 and 5, timm and open_clip read it (`hub/export_clip.py` says how). No experts.
- `llava`: the whole model as the stock `LlavaForConditionalGeneration` (`LlavaNextForConditionalGeneration` for
  `anyres`), without code of ours. No experts.
- `onnx`: the encoder with its routing, batch size free, checked with ONNX Runtime.
- `merged`: the same kind of checkpoint, `num_experts` 0. Which expert serves a token depends on the token, so top-1
  experts cannot be merged exactly into a plain MLP; this is the best approximation that the images given allow
  (`hub/export_merged.py` says how), and `merge_report.json` its error beside that of dropping the experts.

What a benchmark measured (`evaluation.json`) goes along with `llava` in the type that the weights are stored in: the
one form that is the whole model and computes the same. Any other is to be evaluated itself.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


# Run as a script, Python puts hub/ first on the path, where its file names would shadow other packages
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from hub.export_forms import FORMS, write_export
from hub.weights import DTYPES


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id of a MoVE-KD model or encoder")
    parser.add_argument("dest", type=Path, help="folder to write, new or empty")
    parser.add_argument("--form", required=True, choices=FORMS)
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights; as stored by default")
    parser.add_argument("--images", nargs="+", default=(), help="files or folders of pictures (merged, dense, onnx)")
    parser.add_argument("--rank", type=int, help="merged: the most rank of an update; that of all experts by default")
    parser.add_argument("--revision", help="of the Hub id")
    settings = parser.parse_args(arguments)
    try:
        print(*write_export(**vars(settings)), sep="\n")
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
