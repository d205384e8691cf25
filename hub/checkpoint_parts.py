"""Reads single parts of a MoVE-KD checkpoint: configuration, tower, image processor."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, BaseImageProcessor, CLIPImageProcessor
from transformers import initialization as init

from hub.files import weight_files
from hub.weights import WeightFiles
from modeling_movekd import MoveKDConfig, MoveKDVisionConfig, MoveKDVisionModel, inference
from modeling_movekd.base_encoders_movekd import load_strictly
from modeling_movekd.files import read_json, reading
from modeling_movekd.processing import check_image_processor


TOWER_PREFIX = "model.vision_tower."


def read_config(folder: Path) -> MoveKDConfig | MoveKDVisionConfig:
    """The configuration of a whole model or of an encoder alone."""
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in (MoveKDConfig.model_type, MoveKDVisionConfig.model_type):
        raise ValueError(
            f"{folder} holds a model of type {model_type!r}; 'movekd' or 'movekd_vision' is needed. Convert it with "
            "`python hub/convert.py`."
        )
    weight_files(folder)  # refuses an index that names other folders' files
    return inference.read_config(folder)


def read_weights(folder: Path) -> WeightFiles:
    """The weights of a MoVE-KD checkpoint, which has them in safetensors."""
    paths = weight_files(folder)
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        raise ValueError(f"{folder} holds no weights in safetensors. Save the model with `save_pretrained`.")
    return WeightFiles(paths)


def load_tower(folder: Path, dtype: torch.dtype | None = None) -> MoveKDVisionModel:
    """The vision tower of a whole model or of an encoder, by default in the dtype of its weights. Only it is read."""
    config = read_config(folder)
    vision_config, prefix = config, ""
    if isinstance(config, MoveKDConfig):
        vision_config, prefix = config.vision_config, TOWER_PREFIX
    vision_config.feature_layer = feature_layer(config)
    files = read_weights(folder)
    state_dict = {}
    for key in files.tensors:
        if key.startswith(prefix):
            files.check_dtype(key)
            state_dict[key.removeprefix(prefix)] = files.read(key)
    files.close()
    dtype = dtype or next((tensor.dtype for tensor in state_dict.values()), torch.float32)
    state_dict = {key: tensor.to(dtype) for key, tensor in state_dict.items()}
    with reading(folder), init.no_init_weights():
        tower = MoveKDVisionModel._from_config(vision_config, dtype=dtype)
        load_strictly(tower, state_dict, may_lack=lambda key: False, assign=True)
    return tower.eval()


def tower_config(config: Any) -> Any:
    """The configuration of the vision tower: of a whole model its part, of an encoder the configuration itself."""
    return getattr(config, "vision_config", config)


def feature_layer(config: MoveKDConfig | MoveKDVisionConfig) -> int | list[int]:
    """The hidden state that feeds a projector. Without `feature_layer`, an encoder has LLaVA's -2, or -1 if cut."""
    if isinstance(config, MoveKDConfig):
        return config.vision_feature_layer
    return getattr(config, "feature_layer", -2 if config.add_pooling_layer else -1)


def load_image_processor(folder: Path, config: MoveKDConfig | MoveKDVisionConfig) -> BaseImageProcessor:
    """The encoder's image processor, with one crop per image. For `anyres` that is the whole image, without tiles."""
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ValueError(
            f"{folder} has no image processor. Save the one the tower was trained with there: "
            "`processor.save_pretrained(folder)`."
        )
    with reading(folder):
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    check_image_processor(processor, config)
    if isinstance(config, MoveKDConfig) and config.image_aspect_ratio == "anyres":
        size = config.vision_config.image_size
        return CLIPImageProcessor(
            size={"height": size, "width": size},
            do_center_crop=False,
            image_mean=processor.image_mean,
            image_std=processor.image_std,
            resample=processor.resample,
        )
    return processor
