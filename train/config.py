"""Configuration of a MoVE-KD training run: TRL's `SFTConfig` with the method's own keys and presets."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from transformers.trainer_utils import HubStrategy
from trl import SFTConfig

from hub.card_licenses import check_license


# Every knob that tells the three forms of the method apart. A knob of the configuration that is left at `None` takes
# the preset's value. `paper` is what the paper's text says, `released` what the authors' code does, `student_heads`
# this project's form: heads on the student's side against whitened features of the teachers.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "router_gradient": "straight_through",
        "expert_init": "zero",
        "expert_bias": False,
        "head_side": "teacher",
        "head_form": "mlp",
        "feature_normalization": "none",
        "grid_matching": "learned",
        "token_weighting": "cls_attention",
        "teacher_weighting": "cls_similarity",
        "clip_share": 0.8,
        "lambda_kd": 0.5,
        "balance_form": "per_layer",
        "lambda_balance": 0.01,
        "distill_text_only_rows": False,
        "geometry": "shared",
        "cut_tower": True,
    },
}
PRESETS["released"] = PRESETS["paper"] | {
    "router_gradient": "none",
    "expert_init": "kaiming",
    "expert_bias": True,
    "token_weighting": "released",
    "teacher_weighting": "released",
    "balance_form": "pooled",
    "distill_text_only_rows": True,
    "geometry": "per_teacher",
    "cut_tower": False,
}
PRESETS["student_heads"] = PRESETS["paper"] | {
    "head_side": "student",
    "head_form": "unit_linear",
    "feature_normalization": "whiten",
    "grid_matching": "resample",
    "token_weighting": "none",
    "teacher_weighting": "equal",
    "clip_share": 0.2,
    "lambda_kd": 4.0,
}


@dataclass
class DataArguments:
    """
    What to train on.

    Args:
        dataset_name (`list[str]`): LLaVA JSON files, Parquet files or folders, `save_to_disk` folders, or Hub ids; put
            one behind the other. In YAML each may be a mapping of [`~train.data.datasets.DataSource`]: `name`, and
            `weight`, `image_folder`, `subset`, `split`. With weights the mixture is drawn by them.
        mixture_stopping_strategy (`str`, defaults to `"first_exhausted"`): When a weighted mixture ends: with the
            first data set that is used up, so that no row comes twice, or with the last (`"all_exhausted"`). In a
            stream it does not end: each data set begins again by itself.
        dataset_train_split, dataset_test_split (`str`): Splits of a data set that has several.
        validation_share (`float`, defaults to 0): Share of the rows that is held back to evaluate on, instead of
            `dataset_test_split`. Evaluation during training is turned on by `eval_strategy`.
        image_folder (`str`, *optional*): Where the paths in the data's `image` field start.
        streaming (`bool`, defaults to `False`): Read rows as they are needed; wants `max_steps`.
        shuffle_buffer_size (`int`, defaults to 1000): Rows of a stream (of each data set in a weighted mixture) among
            which the next is drawn; 0 keeps order.
        max_bad_row_share (`float`, defaults to 0.01): Share of unusable rows above which the run stops. In a stream
            it is of the rows that the run will read.
        max_bad_rows (`int`, *optional*): Number of unusable rows above which the run stops, besides the share.
    """

    dataset_name: list[str] = field(
        metadata={"help": "LLaVA JSON, Parquet, save_to_disk folders, or Hub ids; in YAML also mappings."}
    )
    mixture_stopping_strategy: Literal["first_exhausted", "all_exhausted"] = field(
        default="first_exhausted", metadata={"help": "Which data set ends a weighted mixture."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on, if asked to."})
    validation_share: float = field(default=0.0, metadata={"help": "Share of the rows held back to evaluate on."})
    image_folder: str | None = field(default=None, metadata={"help": "Where the data's image paths start."})
    streaming: bool = field(default=False, metadata={"help": "Read rows as they are needed; wants max_steps."})
    shuffle_buffer_size: int = field(default=1000, metadata={"help": "Rows that a stream is shuffled among."})
    max_bad_row_share: float = field(default=0.01, metadata={"help": "Share of unusable rows that stops the run."})
    max_bad_rows: int | None = field(default=None, metadata={"help": "Number of unusable rows that stops the run."})

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share is a share from 0 up to 1, got {self.validation_share}.")


@dataclass
class ModelArguments:
    """
    Which student to train, besides `vision_model` and `language_model` of [`MoveKDSFTConfig`].

    Args:
        model_name_or_path (`str`, *optional*): A saved student (and its distiller) to continue, Hub id or folder.
        model_revision (`str`, *optional*): Its branch, tag or commit on the Hub.
        dtype (`str`, defaults to `"float32"`): Data type the weights are loaded in.
        attn_implementation (`str`, *optional*): `sdpa`, `eager`, `flex_attention` or `flash_attention_2`.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "A saved student to continue."})
    model_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit on the Hub."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Data type of the loaded weights.", "choices": ["float32", "bfloat16", "float16", "auto"]},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention kernel."})


@dataclass
class MoveKDSFTConfig(SFTConfig):
    r"""
    Arguments of [`MoveKDTrainer`]. Beside TRL's own (whose names and meanings stay):

    Args:
        stage (`str`, defaults to `"finetune"`): `"pretrain"` trains the experts, routers, distillation heads and
            projector; `"finetune"` everything but the teachers.
        vision_model (`str`, *optional*): CLIP checkpoint (Hub id or folder) that becomes the student.
        language_model (`str`, *optional*): Causal language model (Hub id or folder). `vision_model` and
            `language_model` build a new student; `model_name_or_path` continues one. A language model with experts of
            its own wants `router_aux_loss_coef: 0`.
        image_aspect_ratio (`str`, defaults to `"pad"`): `"pad"` (LLaVA-1.5) or `"anyres"` (LLaVA-NeXT). A continued
            student's has to be given, as its experts' settings and `cut_tower`.
        chat_template (`str`, defaults to `"vicuna_v1"`): `"vicuna_v1"`, `"plain"`, or the tokenizer's own if `"own"`,
            which of a continued student is the one it was saved with. Stage `pretrain` trains on `plain`, whatever
            the published template is.
        teachers (`list[str]`, *optional*): Names of built-in rows, Hub ids, folders, or (in YAML) mappings of
            [`TeacherConfig`]. The one called `clip` gives the token and teacher weights.
        distill (`bool`, defaults to `True`): Whether to distil at all. `False` with `num_experts=0` is plain LLaVA.
        distill_tiles (`str`, defaults to `"base"`): What of an `anyres` image is distilled: `"base"`, the whole image;
            `"all"`, its tiles too, which share the image's weight. The teachers then run on each of them.
        distillation_preset (`str`, defaults to `"paper"`): `"paper"`, `"released"` or `"student_heads"`; sets every
            knob below that is left at `None` (see `PRESETS`).
        num_experts, lora_rank, lora_alpha, lora_dropout: The mixture of LoRA experts. `num_experts=0` turns it off.
        freeze_vision_tower (`bool`, defaults to `False`): Keep the whole tower, experts included, as it is.
        vision_tower_learning_rate (`float`, *optional*): Learning rate of the tower; `learning_rate` by default.
        language_model_learning_rate (`float`, *optional*): Learning rate of the language model, trained in full;
            `learning_rate` by default. A lower one lets the projector find the words that the model knows already.
        language_lora_rank (`int`, defaults to 0): Rank of LoRA in the language model, which then is frozen under it,
            embedding and head included; everything else trains as ever. 0 trains the language model in full.
        language_lora_alpha (`int`, *optional*): LoRA is scaled by alpha / rank; twice the rank by default.
        language_lora_dropout (`float`, defaults to 0.05): Dropout on LoRA's input.
        language_lora_learning_rate (`float`, *optional*): Learning rate of LoRA; `learning_rate` by default.
        language_lora_target_modules (`list[str]`, *optional*): Names of the layers that get LoRA; by default every
            linear layer of the language model except the head.
        load_in_4bit (`bool`, defaults to `False`): Keep the weights under LoRA in 4 bits (QLoRA).
        feature_statistics_images (`int`, defaults to 1024): Images in the first pass over the data that measures the
            teachers' statistics, where the preset normalises their features.
        whitening_components (`int`, defaults to 64): Principal components kept of each teacher's features. Heads that
            cannot amplify want a direction of the student's tokens for each: all teachers' together, not more than the
            student has channels.
        group_by_modality_length (`bool`, defaults to `False`): Batches of one modality and similar length.
        global_batch_size (`int`, *optional*): Rows of one optimiser step over all processes. Sets
            `gradient_accumulation_steps`, so that a recipe means the same on any number of GPUs.
        feature_cache (`str`, *optional*): Folder with the teachers' features of this data, written by
            `python -m train.feature_cache`; the teachers themselves are then not loaded.
        visualize_steps (`int`, defaults to 0): Draw what the student's tower does on the same images after every so
            many steps, into `pictures/` of the output folder and to the trackers; 0 draws nothing.
        visualize_images (`int`, defaults to 4): How many images: the first of the evaluation data, else of the
            training data.
        license (`str`, *optional*): Identifier of the student's licence for its model card, as `llama2`; by default it
            follows from those of the models the student is made of, as far as they are known.

    Raises:
        ValueError: for settings that would silently do nothing or train wrongly; the message names the way out.
    """

    stage: Literal["pretrain", "finetune"] = field(default="finetune", metadata={"help": "Training stage."})
    vision_model: str | None = field(default=None, metadata={"help": "CLIP checkpoint that becomes the student."})
    language_model: str | None = field(default=None, metadata={"help": "Causal language model of the student."})
    image_aspect_ratio: Literal["pad", "anyres"] = field(default="pad", metadata={"help": "How images are cut."})
    chat_template: str = field(default="vicuna_v1", metadata={"help": "Conversation format: vicuna_v1, plain or own."})
    teachers: list[str] | None = field(
        default=None, metadata={"help": "Teachers: names of built-in rows, Hub ids, folders, or YAML mappings."}
    )
    distill: bool = field(default=True, metadata={"help": "Whether to distil."})
    distill_tiles: Literal["base", "all"] = field(
        default="base", metadata={"help": "Distil the whole image, or all tiles of anyres too."}
    )
    distillation_preset: Literal["paper", "released", "student_heads"] = field(
        default="paper", metadata={"help": "Form of the method; sets every knob that is not given."}
    )
    num_experts: int = field(default=3, metadata={"help": "LoRA experts per MLP; 0 turns MoLE off."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of each expert."})
    lora_alpha: float = field(default=1.0, metadata={"help": "Experts are scaled by lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the experts' input."})
    freeze_vision_tower: bool = field(default=False, metadata={"help": "Keep the whole vision tower as it is."})
    vision_tower_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the tower."})
    language_model_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the language model, trained in full."}
    )
    language_lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA in the language model; 0: no LoRA."})
    language_lora_alpha: int | None = field(default=None, metadata={"help": "LoRA's scale, times its rank."})
    language_lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on LoRA's input."})
    language_lora_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of LoRA."})
    language_lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get LoRA; all linear layers but the head by default."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Keep the weights under LoRA in 4 bits (QLoRA)."})
    feature_statistics_images: int = field(default=1024, metadata={"help": "Images that measure the teachers."})
    whitening_components: int = field(default=64, metadata={"help": "Principal components kept per teacher."})
    group_by_modality_length: bool = field(default=False, metadata={"help": "Batches of one modality and length."})

    global_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of one step over all processes; sets gradient_accumulation_steps."}
    )

    feature_cache: str | None = field(default=None, metadata={"help": "Folder of the teachers' cached features."})
    visualize_steps: int = field(default=0, metadata={"help": "Steps from one set of pictures to the next; 0: none."})
    visualize_images: int = field(default=4, metadata={"help": "Images that pictures are drawn of."})
    license: str | None = field(default=None, metadata={"help": "Licence of the student, for its model card."})

    # Knobs of the preset
    router_gradient: Literal["straight_through", "none"] | None = field(
        default=None, metadata={"help": "Preset knob."}
    )
    expert_init: Literal["zero", "kaiming"] | None = field(default=None, metadata={"help": "Preset knob."})
    expert_bias: bool | None = field(default=None, metadata={"help": "Preset knob."})
    head_side: Literal["teacher", "student"] | None = field(default=None, metadata={"help": "Preset knob."})
    head_form: Literal["mlp", "unit_linear"] | None = field(default=None, metadata={"help": "Preset knob."})
    feature_normalization: Literal["none", "standardize", "whiten"] | None = field(
        default=None, metadata={"help": "Preset knob."}
    )
    grid_matching: Literal["learned", "resample"] | None = field(default=None, metadata={"help": "Preset knob."})
    token_weighting: Literal["cls_attention", "released", "none"] | None = field(
        default=None, metadata={"help": "Preset knob."}
    )
    teacher_weighting: Literal["cls_similarity", "released", "equal"] | None = field(
        default=None, metadata={"help": "Preset knob."}
    )
    clip_share: float | None = field(default=None, metadata={"help": "Preset knob: share of the CLIP teacher."})
    lambda_kd: float | None = field(default=None, metadata={"help": "Preset knob: weight of the distillation loss."})
    balance_form: Literal["per_layer", "pooled"] | None = field(default=None, metadata={"help": "Preset knob."})
    lambda_balance: float | None = field(default=None, metadata={"help": "Preset knob: weight of the balance loss."})
    distill_text_only_rows: bool | None = field(default=None, metadata={"help": "Preset knob."})
    geometry: Literal["shared", "per_teacher"] | None = field(default=None, metadata={"help": "Preset knob."})
    cut_tower: bool | None = field(default=None, metadata={"help": "Preset knob: drop the layers not in use."})

    # Defaults that differ from TRL's
    max_length: int | None = field(default=2048, metadata={"help": "Longest sequence in tokens; longer text is cut."})
    hub_strategy: HubStrategy | str = field(default="end", metadata={"help": "When to publish: at the end."})
    assistant_only_loss: bool = field(default=True, metadata={"help": "Loss on the assistant's turns only."})

    def __post_init__(self) -> None:
        if self.global_batch_size is not None:
            # Before TRL and DeepSpeed read it, which is also before the processes have met
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            steps = accumulation_steps(self.global_batch_size, self.per_device_train_batch_size, processes)
            given: int = self.gradient_accumulation_steps
            if given not in (1, steps):
                raise ValueError(
                    f"`gradient_accumulation_steps` is {given}, but `global_batch_size` "
                    f"{self.global_batch_size} asks for {steps} on {processes} processes. Give one of the two."
                )
            self.gradient_accumulation_steps: int = steps
        super().__post_init__()
        self.batch_summary()
        # The parser checks what is typed on the command line, but not what a YAML file says
        for name, annotation in MoveKDSFTConfig.__annotations__.items():
            literals = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
            choices = [choice for literal in literals for choice in get_args(literal)]
            value = getattr(self, name)
            if choices and value not in (choices if get_origin(annotation) is Literal else [*choices, None]):
                raise ValueError(f"`{name}` is {value!r}; choose one of {choices}.")
        for knob, value in PRESETS[self.distillation_preset].items():
            if getattr(self, knob) is None:
                setattr(self, knob, value)
        if self.distill and not self.teachers:
            raise ValueError("`distill` is true but `teachers` is empty. Name teachers, or set `distill: false`.")
        if self.distill and self.freeze_vision_tower:
            raise ValueError("`freeze_vision_tower` leaves nothing to distil into. Set `distill: false`, or unfreeze.")
        tower_trains = self.stage == "finetune" or self.distill or self.num_experts > 0
        if self.vision_tower_learning_rate is not None and (self.freeze_vision_tower or not tower_trains):
            raise ValueError(
                f"`vision_tower_learning_rate` is {self.vision_tower_learning_rate}, but with `freeze_vision_tower` "
                f"{self.freeze_vision_tower}, stage '{self.stage}', `distill` {self.distill} and `num_experts` "
                f"{self.num_experts} the tower does not train. Leave it out, or train the tower."
            )
        self._check_distill_tiles()
        self._check_language_lora()
        if self.push_to_hub and self.hub_strategy != "end":
            raise ValueError(
                f"`hub_strategy` is '{HubStrategy(self.hub_strategy).value}'; a run is published at its end, checked "
                "and without the optimiser's state. Set it to 'end'; `python hub/push.py` pushes what lies between."
            )
        self.license = None if self.license is None else check_license(self.license)
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {self.label_smoothing_factor}; with it TRL computes the text loss in a "
                "second forward, apart from the distillation loss. Set it to 0."
            )
        refuse_reentrant_checkpointing(self)

    def _check_distill_tiles(self) -> None:
        if self.distill_tiles == "base":
            return
        needed = {"distill": True, "image_aspect_ratio": "anyres", "geometry": "shared", "feature_cache": None}
        other = {name: getattr(self, name) for name, value in needed.items() if getattr(self, name) != value}
        if other:
            way_out = {name: needed[name] for name in other}
            raise ValueError(
                f"`distill_tiles` is {self.distill_tiles!r}, with {other}. Tiles are crops of `anyres` that student "
                f"and teachers share, and a feature cache holds none: set {way_out}, or `distill_tiles: base`."
            )

    def _check_language_lora(self) -> None:
        if self.language_lora_alpha is None:
            self.language_lora_alpha = 2 * self.language_lora_rank
        if self.language_lora_rank < 0 or (self.language_lora_rank and self.language_lora_alpha <= 0):
            raise ValueError(
                f"`language_lora_rank` is {self.language_lora_rank} and `language_lora_alpha` "
                f"{self.language_lora_alpha}; give positive numbers, or rank 0 for no LoRA."
            )
        settings = {
            name: getattr(self, name)
            for name, definition in MoveKDSFTConfig.__dataclass_fields__.items()
            if name.startswith("language_lora_") and getattr(self, name) not in (definition.default, 0)
        }
        if settings and not self.language_lora_rank:
            raise ValueError(f"`language_lora_rank` is 0, where {settings} do nothing. Set a rank, or leave them out.")
        if not 0 <= self.language_lora_dropout < 1:
            raise ValueError(f"`language_lora_dropout` is {self.language_lora_dropout}; it is a share below 1.")
        if self.language_lora_rank and self.stage != "finetune":
            raise ValueError(
                f"`language_lora_rank` is {self.language_lora_rank}, but stage '{self.stage}' keeps the language "
                "model frozen. Set it to 0, or `stage: finetune`."
            )
        if self.language_model_learning_rate is not None and (self.stage != "finetune" or self.language_lora_rank):
            raise ValueError(
                f"`language_model_learning_rate` is {self.language_model_learning_rate}, but under stage "
                f"'{self.stage}' with `language_lora_rank` {self.language_lora_rank} the language model's own weights "
                "do not train. Leave it out; LoRA has `language_lora_learning_rate`."
            )
        if self.load_in_4bit and not self.language_lora_rank:
            raise ValueError(
                f"`load_in_4bit` is true, but `language_lora_rank` is {self.language_lora_rank}; 4-bit weights cannot "
                "be trained themselves. Set a rank."
            )

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimiser step over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def rows_of_run(self) -> int:
        """Rows of a stream that `max_steps` steps read over all processes."""
        return self.max_steps * self.rows_per_step

    def batch_summary(self) -> str:
        """
        One sentence for the log: how the global batch comes about.

        Raises:
            ValueError: if it is not the `global_batch_size` asked for, as where one process drives several GPUs.
        """
        rows = self.rows_per_step
        if self.global_batch_size not in (None, rows):
            raise ValueError(
                f"`global_batch_size` is {self.global_batch_size}, but a step takes {rows} rows: "
                f"{self.train_batch_size} per process, {self.gradient_accumulation_steps} accumulated, on "
                f"{self.world_size} processes. Start one process per device with `accelerate launch`."
            )
        return (
            f"Global batch {rows}: {self.train_batch_size} per process, {self.gradient_accumulation_steps} "
            f"accumulated, on {self.world_size} processes."
        )

    def preset_options(self) -> dict[str, Any]:
        """The preset's knobs as they stand, overrides included."""
        return {knob: getattr(self, knob) for knob in PRESETS["paper"]}


def accumulation_steps(global_batch_size: int, per_device_batch_size: int, processes: int) -> int:
    """
    Micro-batches that one optimiser step accumulates, so that it takes `global_batch_size` rows.

    Raises:
        ValueError: if the global batch is no multiple of what the processes take at once.
    """
    steps, rest = divmod(global_batch_size, per_device_batch_size * processes)
    if steps < 1 or rest:
        share, uneven = divmod(global_batch_size, processes)
        sizes = [] if uneven else [size for size in range(1, share + 1) if share % size == 0]
        way_out = f"`per_device_train_batch_size` one of {sizes}" if sizes else "a number of processes that divides it"
        raise ValueError(
            f"`global_batch_size` is {global_batch_size}, no multiple of {per_device_batch_size} rows on each of "
            f"{processes} processes. Give {way_out}."
        )
    return steps


def refuse_reentrant_checkpointing(args: SFTConfig) -> None:
    """
    Raises:
        ValueError: if activation checkpointing is on in its reentrant form, which silently cuts the routers off.
    """
    kwargs = args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs or {}
    if (args.activation_checkpointing or args.gradient_checkpointing) and kwargs.get("use_reentrant"):
        raise ValueError(
            "Activation checkpointing with `use_reentrant: true` gives the routers no gradient. Set it to false."
        )
