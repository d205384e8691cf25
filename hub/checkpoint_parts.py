"""Reads parts of a MoVE-KD checkpoint, each alone: configuration, tower, image processor."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoImageProcessor, BaseImageProcessor, CLIPImageProcessor
from transformers import initialization as init

from hub.files import weight_files
from modeling_movekd import MoveKDConfig, MoveKDVisionConfig, MoveKDVisionModel
from modeling_movekd.files import read_json
from modeling_movekd.vision_movekd import load_strictly


TOWER_PREFIX = "model.vision_tower."


def read_config(folder: Path) -> MoveKDConfig | MoveKDVisionConfig:
    """
    The configuration of a whole model or of an encoder alone.

    Raises:
        ValueError: if the folder holds no MoVE-KD checkpoint, with the model type that was found.
    """
    model_type = read_json(folder / "config.json").get("model_type")
    for config_class in (MoveKDConfig, MoveKDVisionConfig):
        if model_type == config_class.model_type:
            return config_class.from_pretrained(folder)
    raise ValueError(
        f"{folder} holds a model of type {model_type!r}; 'movekd' or 'movekd_vision' is needed. `hub/convert.py` "
        "makes one of other checkpoints."
    )


def load_tower(folder: Path, dtype: torch.dtype | None = None) -> MoveKDVisionModel:
    """
    The vision tower of a checkpoint, of the encoder alone or of a whole model; nothing else of it is read.

    Args:
        dtype: Of the weights; by default as they are stored.

    Raises:
        ValueError: if weights of the tower are missing or left over, naming them.
    """
    config = read_config(folder)
    vision_config, prefix = config, ""
    if isinstance(config, MoveKDConfig):
        vision_config, prefix = config.vision_config, TOWER_PREFIX
    vision_config.feature_layer = feature_layer(config)
    state_dict = {}
    paths = weight_files(folder)
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        raise ValueError(f"{folder} holds no weights in safetensors, which `save_pretrained` writes.")
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                if key.startswith(prefix):
                    state_dict[key.removeprefix(prefix)] = file.get_tensor(key)
    dtype = dtype or next((tensor.dtype for tensor in state_dict.values()), torch.float32)
    state_dict = {key: tensor.to(dtype) for key, tensor in state_dict.items()}
    with init.no_init_weights():
        tower = MoveKDVisionModel._from_config(vision_config, dtype=dtype)
    load_strictly(tower, state_dict, may_lack=lambda key: False, assign=True)
    return tower.eval()


def feature_layer(config: MoveKDConfig | MoveKDVisionConfig) -> int | list[int]:
    """
    The hidden state that feeds a projector: the last one of a cut tower. An encoder that was saved alone and whole
    says it in its field `feature_layer`, else it is LLaVA's -2.
    """
    if isinstance(config, MoveKDConfig):
        return config.vision_feature_layer
    return getattr(config, "feature_layer", -2 if config.add_pooling_layer else -1)


def load_image_processor(folder: Path, config: MoveKDConfig | MoveKDVisionConfig) -> BaseImageProcessor:
    """
    The image processor of the encoder alone: one crop per image, as the tower saw it in training. That is the
    checkpoint's own for `pad`; for `anyres`, whose processor makes tiles, the crop of the whole image.

    Raises:
        ValueError: if the checkpoint has none.
    """
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ValueError(
            f"{folder} has no image processor. Save the one the tower was trained with there: "
            "`processor.save_pretrained(folder)`."
        )
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
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
