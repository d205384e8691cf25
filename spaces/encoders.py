"""Other encoders to compare with the student: plain CLIP and the teachers."""

import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from images import shared_crop
from PIL import Image
from student import Student
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel


CLONE = Path(__file__).resolve().parent.parent
DEMO_TOWERS = CLONE / "train" / "demo" / "weights"


class OtherWeights(ValueError):
    """An encoder is not the one that the student started from."""


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Return what `weights_fingerprint` of `train/model_card.py` wrote into the metadata of the student."""
    digests = sorted(sha256(weight.detach().float().numpy().tobytes()).hexdigest() for weight in model.parameters())
    return sha256("".join(digests).encode()).hexdigest()


class Encoder:
    """
    A vision model of transformers.

    Args:
        name (`str`): Name in the pictures.
        model_id (`str`): Hub id or folder.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        student (`Student`): The student, which gives device, dtype and crop.
        follows_layer (`bool`): Whether to show the chosen layer, as for plain CLIP, instead of the last.
    """

    def __init__(self, name: str, model_id: str, revision: str | None, student: Student, follows_layer: bool) -> None:
        loaded, info = AutoModel.from_pretrained(model_id, revision=revision, dtype="auto", output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"{model_id} lacks weights of {type(loaded).__name__}: {sorted(info['missing_keys'])}")
        self.name, self.follows_layer = name, follows_layer
        vision: PreTrainedModel = getattr(loaded, "vision_model", loaded)
        expected = student.metadata.get("vision_fingerprint")
        if follows_layer and expected and weights_fingerprint(vision) != expected:
            raise OtherWeights
        self.model = vision.to(student.model.device, student.model.dtype).eval()
        self.processor = AutoImageProcessor.from_pretrained(model_id, revision=revision, backend="pil")
        self.student_images = student.processor.image_processor

    def caption(self, layer: int) -> str:
        return f"{self.name}, layer {layer + 1}" if self.follows_layer else f"{self.name}, last layer"

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Crop, pad or stretch the image as the student's processor does, then resize and normalize it as our own."""
        square = shared_crop(image, self.student_images)
        if square is image and image.width != image.height:  # anyres
            square = image.resize((max(image.size),) * 2, Image.Resampling.BICUBIC)
        settings: dict[str, Any] = {}
        if getattr(self.processor, "do_center_crop", False):
            # The crop would show another part of the image than the student sees.
            crop = dict(self.processor.crop_size)
            settings = {"do_center_crop": False, "size": {"height": crop["height"], "width": crop["width"]}}
        return self.processor(square, return_tensors="pt", **settings)["pixel_values"]

    @torch.inference_mode()
    def features(self, image: Image.Image, layer: int) -> torch.Tensor:
        """Return the features of the patches `(1, num_patches, width)`, without [CLS] and registers."""
        pixels = self.pixels(image).to(self.model.device, self.model.dtype)
        outputs = self.model(pixels, output_hidden_states=self.follows_layer)
        tokens = outputs.hidden_states[layer + 1] if self.follows_layer else outputs.last_hidden_state
        if tokens.dim() == 4:
            return tokens.flatten(2).transpose(1, 2)
        patch = getattr(self.model.config, "patch_size", None)
        if patch is None:
            return tokens[:, tokens.shape[1] - int(tokens.shape[1] ** 0.5) ** 2 :]
        patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        return tokens[:, tokens.shape[1] - patches :]


def wanted(student: Student) -> list[tuple[str, str, str | None, bool]]:
    """
    Return name, id, revision and `follows_layer` of each encoder to load.

    The variables `CLIP_ID`, `CLIP_REVISION` and `TEACHER_IDS` name them. The default is the CLIP in the checkpoint's
    metadata, and for the demo also the teachers of the clone.
    """
    origin, found = _origin(student), []
    teachers = {entry["name"]: entry for entry in student.metadata.get("teachers", [])}
    clip = os.environ.get("CLIP_ID") or _locate(student, origin.get("model"))
    if clip and clip != "none":
        found.append((plain_name(student), clip, os.environ.get("CLIP_REVISION") or origin.get("revision"), True))
    if given := os.environ.get("TEACHER_IDS"):
        for entry in (part.strip() for part in given.split(",")):
            name, _, source = entry.rpartition("=")
            source, _, revision = source.partition("@")
            found.append((name or source.rsplit("/", 1)[-1], source, revision or None, False))
    else:
        for name, entry in teachers.items():
            local = _locate(student, entry.get("model"))
            if local and local != clip and Path(local).is_dir():
                found.append((name, local, None, False))
    return found


def plain_name(student: Student) -> str:
    # Older code of a checkpoint has no `class_token`
    has_cls = getattr(student.model.config.vision_config, "class_token", True)
    return "plain CLIP" if has_cls else "plain SigLIP"


def _origin(student: Student) -> dict[str, Any]:
    """Return the metadata's entry of the CLIP that the student started from."""
    metadata = student.metadata
    teachers = {entry["name"]: entry for entry in metadata.get("teachers", [])}
    origin = next((entry for entry in metadata.get("base_models", []) if entry.get("role") == "vision_model"), None)
    origin = origin or teachers.get("clip", {})
    return {**origin, "model": metadata.get("vision_model") or origin.get("model")}


def _locate(student: Student, name: str | None) -> str | None:
    """Return a Hub id unchanged, and the folder of a tower of the demo if the student is a folder in a clone."""
    if name and name.count("/") == 1 and not os.path.exists(name):
        return name
    folder = DEMO_TOWERS / Path(name or "").name
    return str(folder) if name and Path(student.model_id).is_dir() and folder.is_dir() else None


def load_encoders(student: Student) -> tuple[list[Encoder], list[str]]:
    """
    Load the encoders, and return a sentence for each that is not shown.

    Metadata names folders without their paths. A folder of that name is shown only if the CLIP in it has the weights
    whose fingerprint is in the metadata, and teachers are shown only beside such a CLIP.
    """
    encoders: list[Encoder] = []
    failures: list[str] = []
    named = _origin(student)["model"]
    if named and not os.environ.get("CLIP_ID") and not _locate(student, named):
        failures.append(
            f"{plain_name(student)} is not shown: there is no {Path(named).name} here. Name it by CLIP_ID."
        )
    for name, model_id, revision, follows in wanted(student):
        shown_id = Path(model_id).name if os.path.exists(model_id) else model_id
        variable = "CLIP_ID" if follows else "TEACHER_IDS"
        is_guess = os.path.exists(model_id) and not os.environ.get(variable)
        try:
            if is_guess and not (student.metadata.get("vision_fingerprint") if follows else encoders):
                raise OtherWeights
            encoders.append(Encoder(name, model_id, revision, student, follows))
        except OtherWeights:
            failures.append(
                f"{name} is not shown: the weights in {shown_id} are not known to be those that the student was made "
                f"with. Name the right ones by {variable}."
            )
        except (OSError, ValueError, KeyError) as error:
            failures.append(f"{name} ({shown_id}) is not shown: it could not be loaded ({type(error).__name__}).")
            print(f"{model_id}: {error}")
    return encoders, failures
