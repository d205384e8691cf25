"""The method's options and their checks. Nothing here imports torch, so that arguments are checked at once."""

import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from hub.card_licenses import check_license
from train.encoder_options import check_student_image_sizes, refuse_unused_options
from train.expert_options import check_expert_assignment, set_balance
from train.presets import PRESETS


def option(help: str, **kwargs: Any) -> Any:
    """A field of a dataclass with a sentence for `--help`, as transformers' `HfArg`. The rest as in `field`."""
    return field(metadata={"help": help, **kwargs.pop("metadata", {})}, **kwargs)


def preset_option(name: str, help: str) -> Any:
    """A field that defaults to the preset's value, which `--help` shows for each preset."""
    values = ", ".join(f"{preset} {options[name]}" for preset, options in PRESETS.items())
    return option(f"{help} By preset: {values}.", default=None)


def accumulation_steps(global_batch_size: int, per_device_batch_size: int, processes: int) -> int:
    """
    The number of micro-batches that one optimizer step accumulates to take `global_batch_size` rows.

    Raises:
        ValueError: if the processes cannot take that many rows.
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


@dataclass
class MethodOptions:
    """
    The options that [`~train.config.MoveKDSFTConfig`] adds to TRL's. The `help` of each field describes it. Options of
    [`PRESETS`] that are left at `None` take the value of `distillation_preset`.
    """

    stage: Literal["encoder", "pretrain", "finetune"] = option(
        default="finetune",
        help="`encoder` distils into the vision tower alone, without a language model; `pretrain` trains experts, "
        "routers, distillation heads and projector; `finetune` everything except the teachers.",
    )
    vision_model: str | None = option(
        default=None,
        help="CLIP, SigLIP or SigLIP 2 (Hub id or folder) that a new student starts from; or the result of stage "
        "`encoder`, whose experts and distillation heads go on.",
    )
    language_model: str | None = option(
        default=None,
        help="Causal language model (Hub id or folder) of a new student. For a mixture-of-experts model set "
        "`router_aux_loss_coef: 0`.",
    )
    image_aspect_ratio: Literal["pad", "anyres"] = option(
        default="pad",
        help="`pad` shows the image padded to a square (LLaVA-1.5); `anyres` also shows tiles of the image "
        "(LLaVA-NeXT). Must be that of the saved student if one is continued.",
    )
    chat_template: str = option(
        default="vicuna_v1",
        help="Conversation format: `vicuna_v1`, `plain`, or `own` for the tokenizer's (or the saved student's) "
        "template. Stage `pretrain` trains with `plain`, but saves this template.",
    )
    teachers: list[str] | None = option(
        default=None,
        help="Teachers: built-in names, Hub ids or folders; in YAML also mappings with the fields of `TeacherConfig`. "
        "The teacher named `clip` provides the token and teacher weights.",
    )
    distill: bool = option(
        default=True, help="Train with distillation. `false` with `num_experts: 0` trains a plain LLaVA."
    )
    distill_tiles: Literal["base", "all"] = option(
        default="base",
        help="Crops of an `anyres` image to distill: `base` the whole image, `all` also its tiles, which share the "
        "image's weight in the loss.",
    )
    student_image_sizes: list[int] | None = option(
        default=None,
        help="Sizes in pixels, one of which is drawn for the student in each step of stage `encoder`, where it sees "
        "the image smaller; multiples of the patch size, below the tower's image size, which may be one of them.",
    )
    distillation_preset: Literal["paper", "released", "student_heads", "radio", "eupe", "unic", "theia"] = option(
        default="paper",
        help="Form of the method: `paper` follows the text, `released` the original code, `student_heads` puts heads "
        "on the student; `radio`, `eupe`, `unic` and `theia` follow those papers. Sets each option with values by "
        "preset that is not given.",
    )
    reset_distiller: bool = option(
        default=False,
        help="Start with new heads when a student is continued, as other teachers or another preset need.",
    )
    num_experts: int = option(default=3, help="Number of LoRA experts in each MLP of the tower; 0 for none.")
    lora_rank: int = option(default=32, help="Rank of each expert.")
    lora_alpha: float = option(default=1.0, help="The output of an expert is scaled by lora_alpha / lora_rank.")
    expert_assignment: Literal["router", "teacher"] = option(
        default="router",
        help="Who chooses the expert for the distillation loss: the `router`, or with `teacher` each teacher has its "
        "own, one of `num_experts`.",
    )
    balance_rate: float | None = option(default=None, help="A step of `balance_form: bias`; 0.001 by default.")
    freeze_vision_tower: bool = option(default=False, help="Freeze the whole vision tower, including its experts.")
    freeze_base_tower: bool = option(
        default=False,
        help="Stages `encoder` and `finetune`: of the vision tower, train only the experts and routers, as `pretrain` "
        "does.",
    )
    vision_tower_learning_rate: float | None = option(
        default=None, help="Learning rate of the vision tower; `learning_rate` by default."
    )
    language_model_learning_rate: float | None = option(
        default=None, help="Learning rate of the language model if it trains in full; `learning_rate` by default."
    )
    language_lora_rank: int = option(
        default=0, help="Rank of LoRA in the language model, whose own weights are then frozen; 0 for no LoRA."
    )
    language_lora_alpha: int | None = option(
        default=None, help="LoRA is scaled by alpha / rank; twice the rank by default."
    )
    language_lora_dropout: float = option(default=0.05, help="Dropout on the input of LoRA.")
    language_lora_learning_rate: float | None = option(
        default=None, help="Learning rate of LoRA; `learning_rate` by default."
    )
    language_lora_target_modules: list[str] | None = option(
        default=None, help="Names of the layers with LoRA; by default all linear layers except the head."
    )
    load_in_4bit: bool = option(default=False, help="Keep the weights under LoRA in 4 bits (QLoRA).")
    feature_statistics_images: int = option(
        default=1024, help="Number of images that the statistics for `feature_normalization` are measured on."
    )
    whitening_components: int = option(
        default=64,
        help="Number of principal components of each teacher that `whiten` keeps. With `unit_linear` heads keep the "
        "sum over the teachers below the student's width.",
    )
    group_by_modality_length: bool = option(
        default=False, help="Make batches of rows of similar length, either all with images or all without."
    )
    global_batch_size: int | None = option(
        default=None,
        help="Rows of one optimizer step over all processes. Sets `gradient_accumulation_steps`, so that a recipe "
        "means the same on any number of GPUs.",
    )
    feature_cache: str | None = option(
        default=None,
        help="Folder with the teachers' features of the training data, written by `python -m train.feature_cache`. "
        "The teachers are then not loaded.",
    )
    eval_generate: int = option(
        default=0,
        help="Number of evaluation rows that the student answers at each evaluation. Logs the share of answers equal "
        "to the data's, `eval_exact_match`, and prints a few.",
    )
    dataloader_timeout: int = option(
        default=600,
        help="Seconds after which the run ends if a worker of the data loader gives no batch; 0 waits forever. For "
        "processes that do not answer each other see `ddp_timeout`.",
    )
    overwrite_output_dir: bool = option(
        default=False,
        help="Start anew in an `output_dir` that holds a student or checkpoints; the checkpoints are removed.",
    )
    visualize_steps: int = option(
        default=0,
        help="Draw the tower's features of the same images every so many steps, into `pictures/` of the output folder "
        "and to the trackers; 0 for never.",
    )
    visualize_images: int = option(
        default=4, help="Number of images to draw, the first of the evaluation data or else of the training data."
    )
    license: str | None = option(
        default=None,
        help="License identifier for the model card, such as `llama2`; by default derived from the base models.",
    )

    router_gradient: Literal["straight_through", "none"] | None = preset_option(
        "router_gradient",
        "Gradient of the routers: `straight_through` from all losses, `none` from the balance loss alone.",
    )
    expert_init: Literal["zero", "kaiming"] | None = preset_option(
        "expert_init", "Initialization of the experts' up-projection: `zero` starts with the output of plain CLIP."
    )
    expert_bias: bool | None = preset_option("expert_bias", "Give the experts' projections a bias.")
    lora_dropout: float | None = preset_option("lora_dropout", "Dropout on the input of the experts.")
    head_side: Literal["teacher", "student"] | None = preset_option(
        "head_side",
        "`teacher` puts adapters on the teachers' features, `student` puts heads on the student's.",
    )
    head_form: Literal["mlp", "unit_linear"] | None = preset_option(
        "head_form", "Form of the heads on the student: a two-layer `mlp`, or a linear layer with rows of length one."
    )
    feature_normalization: Literal["none", "standardize", "whiten", "phi_s"] | None = preset_option(
        "feature_normalization",
        "`standardize` scales each channel of the teachers to zero mean and unit variance, `whiten` also projects on "
        "`whitening_components` principal components of unit variance, `phi_s` rotates the channels to equal variance "
        "and scales all by one number.",
    )
    grid_matching: Literal["learned", "resample", "upsample"] | None = preset_option(
        "grid_matching",
        "How a teacher's patch grid meets the student's: `learned` by a linear layer over the tokens, `resample` to "
        "the student's by pixel-unshuffle or interpolation, `upsample` both to the larger one.",
    )
    distillation_loss: Literal["mse", "cosine", "smooth_l1", "cosine_smooth_l1"] | None = preset_option(
        "distillation_loss", "Loss of a token: `mse`, `cosine`, `smooth_l1`, or `cosine_smooth_l1` for a mixture."
    )
    summary_heads: bool | None = preset_option(
        "summary_heads",
        "Also predict each teacher's summary, its [CLS] token or pooled feature, from the student's [CLS] token.",
    )
    summary_loss: Literal["mse", "cosine", "smooth_l1", "cosine_smooth_l1"] | None = preset_option(
        "summary_loss", "Loss of a summary, as `distillation_loss` of a token."
    )
    cosine_share: float | None = preset_option(
        "cosine_share", "Share of the cosine in `cosine_smooth_l1`; smooth L1 has the rest."
    )
    token_weighting: Literal["cls_attention", "released", "none"] | None = preset_option(
        "token_weighting",
        "Weights of the patches: CLIP's `cls_attention`, `released` with a second softmax over it, or `none`.",
    )
    teacher_weighting: Literal["cls_similarity", "released", "equal"] | None = preset_option(
        "teacher_weighting",
        "Weights of the other teachers: `cls_similarity` to CLIP's CLS token, `released` without its scale, `equal`.",
    )
    clip_share: float | None = preset_option(
        "clip_share", "Weight of the teacher `clip`; the other teachers share the rest. None is an equal share."
    )
    teacher_dropping: float | None = preset_option(
        "teacher_dropping",
        "Probability with which a teacher is dropped for an image, but for the one with the largest loss.",
    )
    lambda_kd: float | None = preset_option("lambda_kd", "Weight of the distillation loss.")
    balance_form: Literal["per_layer", "pooled", "bias"] | None = preset_option(
        "balance_form",
        "Balance loss of the routers: `per_layer` and then averaged, or over the `pooled` layers. `bias` has no loss, "
        "but a bias on the choice.",
    )
    lambda_balance: float | None = preset_option("lambda_balance", "Weight of the balance loss.")
    distill_text_only_rows: bool | None = preset_option(
        "distill_text_only_rows", "Distill a black image for each row without an image."
    )
    geometry: Literal["shared", "per_teacher"] | None = preset_option(
        "geometry",
        "`shared` cuts an image once for all models, `per_teacher` once by each teacher's preprocessing.",
    )
    cut_tower: bool | None = preset_option("cut_tower", "Drop the tower's layers behind the one that is used.")

    # Defaults that differ from TRL's
    max_length: int | None = option(default=2048, help="Longest sequence in tokens; longer text is cut.")
    report_to: list[str] | None = option(
        default=None, help="Trackers, such as `tensorboard trackio`; `all` for the installed ones, none by default."
    )
    hub_strategy: str = option(default="end", help="When to publish; only `end` is supported.")
    assistant_only_loss: bool = option(default=True, help="Compute the text loss on the assistant's turns only.")

    def prepare_options(self: Any) -> None:
        """Bring the options into the form that TRL and transformers take."""
        if self.stage == "encoder" and self.distillation_preset in PRESETS:
            refuse_unused_options(self, PRESETS[self.distillation_preset])
        self.report_to = self.report_to or ["none"]
        # The command line gives text
        words = {"true": True, "false": None, "": None}
        asked = self.resume_from_checkpoint
        self.resume_from_checkpoint = words.get(str(asked or "").lower(), asked)
        # TRL's default is under the former name, for which transformers would warn
        if self.activation_checkpointing is None and self.gradient_checkpointing is True:
            self.activation_checkpointing = True
        # Before TRL and DeepSpeed read `gradient_accumulation_steps`
        self._set_accumulation_steps()

    def check_options(self: Any) -> None:
        """
        Fill in the preset's options.

        Raises:
            ValueError: if an option has no value that it can take, or would have no effect.
        """
        self._check_choices()
        balance_weight = self.lambda_balance
        self._set_preset()
        self._check_distillation()
        check_expert_assignment(self)
        set_balance(self, balance_weight)
        self._check_language_model()
        if self.push_to_hub and (strategy := self.hub_strategy) != "end":
            raise ValueError(
                f"`hub_strategy` is {str(getattr(strategy, 'value', strategy))!r}, but a run is published at its end "
                "only. Set it to 'end'; publish a checkpoint in between with `python hub/push.py`."
            )
        self.license = None if self.license is None else check_license(self.license)
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {self.label_smoothing_factor}, with which TRL computes the text loss in "
                "a second forward without the distillation loss. Set it to 0."
            )

    def _set_preset(self) -> None:
        preset = PRESETS[self.distillation_preset]
        self.keeps_dropout = self.lora_dropout is None
        given = {name: value for name in preset if (value := getattr(self, name)) not in (None, preset[name])}
        for name in preset.keys() - given.keys():
            setattr(self, name, preset[name])
        if "summary_loss" in given and not self.summary_heads:
            raise ValueError(
                f"`summary_loss` is {self.summary_loss!r}, but `summary_heads` is false. Leave it out, or set "
                "`summary_heads: true`."
            )
        losses = {"distillation_loss": self.distillation_loss}
        losses |= {"summary_loss": self.summary_loss} if self.summary_heads else {}
        if "cosine_share" in given and "cosine_smooth_l1" not in losses.values():
            named = " and ".join(f"`{name}` {loss!r}" for name, loss in losses.items())
            raise ValueError(
                f"`cosine_share` is {self.cosine_share}, but {named} has no share. Leave it out, or set "
                "`distillation_loss: cosine_smooth_l1`."
            )

    def _set_accumulation_steps(self: Any) -> None:
        if self.global_batch_size is None:
            return
        processes = int(os.environ.get("WORLD_SIZE", "1"))  # no process group exists yet
        steps = accumulation_steps(self.global_batch_size, self.per_device_train_batch_size, processes)
        given = self.gradient_accumulation_steps
        if given not in (1, steps):
            raise ValueError(
                f"`gradient_accumulation_steps` is {given}, but `global_batch_size` {self.global_batch_size} asks for "
                f"{steps} on {processes} processes. Give one of the two."
            )
        self.gradient_accumulation_steps = steps

    def _check_choices(self) -> None:
        """Check the values of a YAML file; the parser checks those of the command line only."""
        for name, annotation in MethodOptions.__annotations__.items():
            literals = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
            choices = [choice for literal in literals for choice in get_args(literal)]
            value = getattr(self, name)
            if choices and value not in (choices if get_origin(annotation) is Literal else [*choices, None]):
                raise ValueError(f"`{name}` is {value!r}; choose one of {choices}.")

    def _check_distillation(self) -> None:
        if self.distill and not self.teachers:
            raise ValueError("`distill` is true but `teachers` is empty. Name teachers, or set `distill: false`.")
        if self.distill and self.freeze_vision_tower:
            raise ValueError(
                "`freeze_vision_tower` is true, which leaves nothing to distill into. Unfreeze the tower"
                + (", or set `distill: false`." if self.stage != "encoder" else ".")
            )
        if self.freeze_base_tower and (self.stage == "pretrain" or self.freeze_vision_tower or not self.num_experts):
            raise ValueError(
                f"`freeze_base_tower` is true with stage '{self.stage}', `freeze_vision_tower` "
                f"{self.freeze_vision_tower} and `num_experts` {self.num_experts}: it keeps the weights around the "
                "experts frozen in stages 'encoder' and 'finetune'. Set it to false, or train experts there."
            )
        tower_trains = self.stage != "pretrain" or self.distill or self.num_experts > 0
        if self.vision_tower_learning_rate is not None and (self.freeze_vision_tower or not tower_trains):
            raise ValueError(
                f"`vision_tower_learning_rate` is {self.vision_tower_learning_rate}, but with `freeze_vision_tower` "
                f"{self.freeze_vision_tower}, stage '{self.stage}', `distill` {self.distill} and `num_experts` "
                f"{self.num_experts} the tower does not train. Leave the rate out, or train the tower."
            )
        check_student_image_sizes(self)
        if self.distill_tiles == "base":
            return
        needed = {"distill": True, "image_aspect_ratio": "anyres", "geometry": "shared", "feature_cache": None}
        if other := {name: getattr(self, name) for name, value in needed.items() if getattr(self, name) != value}:
            raise ValueError(
                f"`distill_tiles` is {self.distill_tiles!r}, with {other}: tiles are crops of `anyres` that student "
                f"and teachers share, and a feature cache has none. Set { {name: needed[name] for name in other} }, "
                "or `distill_tiles: base`."
            )

    def _check_language_model(self) -> None:
        rank = self.language_lora_rank
        if self.language_lora_alpha is None:
            self.language_lora_alpha = 2 * rank
        if rank < 0 or (rank and self.language_lora_alpha <= 0):
            raise ValueError(
                f"`language_lora_rank` is {rank} and `language_lora_alpha` {self.language_lora_alpha}. Give positive "
                "numbers, or rank 0 for no LoRA."
            )
        settings = {
            field.name: getattr(self, field.name)
            for field in fields(MethodOptions)
            if field.name.startswith("language_lora_") and getattr(self, field.name) not in (field.default, 0)
        }
        if settings and not rank:
            raise ValueError(f"`language_lora_rank` is 0, where {settings} do nothing. Set a rank, or leave them out.")
        if not 0 <= self.language_lora_dropout < 1:
            raise ValueError(
                f"`language_lora_dropout` is {self.language_lora_dropout}. Set it to 0 or more, and below 1."
            )
        if rank and self.stage != "finetune":
            raise ValueError(
                f"`language_lora_rank` is {rank}, but stage '{self.stage}' keeps the language model frozen. Set it to "
                "0, or `stage: finetune`."
            )
        if self.language_model_learning_rate is not None and (self.stage != "finetune" or rank):
            raise ValueError(
                f"`language_model_learning_rate` is {self.language_model_learning_rate}, but under stage "
                f"'{self.stage}' with `language_lora_rank` {rank} the language model's own weights do not train. "
                "Leave the rate out; for LoRA set `language_lora_learning_rate`."
            )
        if self.load_in_4bit and not rank:
            raise ValueError(
                f"`load_in_4bit` is true, but `language_lora_rank` is {rank}, and 4-bit weights cannot be trained. "
                "Set a rank."
            )
