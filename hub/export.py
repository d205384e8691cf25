"""
Export a MoVE-KD checkpoint, or its encoder, for use elsewhere.

    python hub/export.py CHECKPOINT DEST --form encoder                  # the distilled encoder alone
    python hub/export.py CHECKPOINT DEST --form onnx
    python hub/export.py CHECKPOINT DEST --form merged --images photos/  # without experts, with a measured error
    python hub/export.py DEST PLAIN --form clip                          # then plain CLIP, or a stock LLaVA

Forms:

- `encoder`: the vision encoder, for `AutoModel.from_pretrained(DEST, trust_remote_code=True)`.
- `dense`: the encoder with `dense_routing`: every expert serves every token, weighted by the router's probability. The
  outputs of a model that was trained with top-1 routing change; the change is measured on the images given.
- `clip`: plain CLIP for transformers 4 and 5, timm and open_clip (see `hub/export_clip.py`). Needs a tower without
  experts that started from CLIP.
- `llava`: the whole model as the stock `LlavaForConditionalGeneration` (`LlavaNextForConditionalGeneration` for
  `anyres`), without code of ours. Needs a tower without experts.
- `gguf`: `mmproj.gguf` for llama.cpp, and the language model (see `hub/export_gguf.py`). Needs a tower without experts
  that started from CLIP, and `image_aspect_ratio` "pad".
- `onnx`: an encoder with its routing and a dynamic batch size, checked with ONNX Runtime. Of a whole model, the vision
  encoder with its projector, the token embedding and the decoder with its past, for ONNX Runtime and transformers.js.
- `merged`: the same kind of checkpoint with `num_experts` 0. Top-1 experts cannot be merged exactly into a plain MLP,
  because the expert depends on the token. The MLPs are fitted on the images given (see `hub/export_merged.py`), and
  `merge_report.json` compares their error with the error of dropping the experts.

Benchmark results (`evaluation.json`) are copied for `llava` with the dtype of the checkpoint, which computes the same.
Evaluate any other form anew.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


# Run as a script, Python puts hub/ first on the path, where its file names would shadow other packages
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from hub.export_options import DTYPE_NAMES, FORMS, check_options


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id of a MoVE-KD model or encoder")
    parser.add_argument("dest", type=Path, help="folder to write, new or empty")
    parser.add_argument("--form", required=True, choices=FORMS)
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="dtype of the weights; as stored by default")
    parser.add_argument("--images", nargs="+", default=(), help="files or folders of images (merged, dense, onnx)")
    parser.add_argument("--rank", type=int, help="merged: rank of an update at most; that of all experts by default")
    parser.add_argument("--cls-last", action="store_true", help="gguf: for llama.cpp with its issue 25814 (see there)")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub id")
    settings = vars(parser.parse_args(arguments))
    try:
        check_options(**{name: settings[name] for name in ("form", "dtype", "images", "rank", "cls_last")})
        from hub.export_forms import export  # imports torch, which takes seconds

        print(f"Wrote {export(**settings)}.")
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
