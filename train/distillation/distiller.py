"""What stands between the student's tokens and the teachers' features while training (MoVE-KD, arXiv 2501.01709)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from modeling_movekd.files import new_file
from train.distillation.heads import Moments, StudentHead, Target, TeacherAdapter
from train.distillation.losses import (
    CLIP,
    TEACHER_WEIGHTINGS,
    TOKEN_WEIGHTINGS,
    distillation_loss,
    teacher_weights,
    token_weights,
)


if TYPE_CHECKING:
    from train.teachers.features import TeacherFeatures

HEAD_SIDES = ("teacher", "student")
HEAD_FORMS = ("mlp", "unit_linear")
FEATURE_NORMALIZATIONS = ("none", "standardize", "whiten")
GRID_MATCHINGS = ("learned", "resample")
# Where one image's tokens at the student's width have more values than this, a batch passes the adapter in parts, one
# after the other; always as many, since processes with different numbers of images make the same calls under ZeRO-3
LARGE_FEATURES = 2**19
NUM_PARTS = 8


class DistillationOutput(NamedTuple):
    """
    Args:
        loss (`torch.Tensor` of shape `(batch_size,)`): Sum over the weighted teachers, float32, with gradient.
        teacher_losses (`dict[str, torch.Tensor]`): By teacher `(batch_size,)`, unweighted, detached.
        teacher_weights (`dict[str, torch.Tensor]`): By teacher `(batch_size,)`, detached.
    """

    loss: torch.Tensor
    teacher_losses: dict[str, torch.Tensor]
    teacher_weights: dict[str, torch.Tensor]


class Distiller(nn.ModuleDict):
    """
    The adapters or heads of all teachers, by teacher, and the distillation loss they give.

    The teacher `"clip"` is the model that the student started from: beside adapters it has none and is compared as it
    is; beside heads on the student's side it has a head like all others.

    Args:
        student_width (`int`): Channels of the student's tokens.
        student_grid (`tuple[int, int]`): Their (h, w).
        teachers (`Mapping[str, tuple[int, tuple[int, int]]]`): By name the width and the grid of a teacher's features.
        head_side (`str`): `"teacher"`, adapters on the features; `"student"`, heads on the student's tokens.
        head_form (`str`): Of heads on the student's side: `"mlp"`, or `"unit_linear"`, which cannot amplify.
        feature_normalization (`str`): `"none"`; `"standardize"`, zero mean and unit variance per channel; `"whiten"`,
            that and then the first principal components, scaled to unit variance.
        whitening_components (`int`): How many, at most as many as there are channels.
        grid_matching (`str`): `"learned"`, tokens mixed by the adapter; `"resample"`, see [`resample_grid`].
        token_weighting (`str`): See [`~train.distillation.losses.token_weights`].
        teacher_weighting (`str`): See [`~train.distillation.losses.teacher_weights`].
        clip_share (`float`): Share of the teacher `"clip"`, if there are others.

    Raises:
        ValueError: for values outside the choices, or that do not go together, with what to change.
    """

    def __init__(
        self,
        student_width: int,
        student_grid: tuple[int, int],
        teachers: Mapping[str, tuple[int, tuple[int, int]]],
        head_side: str = "teacher",
        head_form: str = "mlp",
        feature_normalization: str = "none",
        whitening_components: int = 64,
        grid_matching: str = "learned",
        token_weighting: str = "cls_attention",
        teacher_weighting: str = "cls_similarity",
        clip_share: float = 0.8,
    ) -> None:
        super().__init__()
        for option, value, choices in (
            ("head_side", head_side, HEAD_SIDES),
            ("head_form", head_form, HEAD_FORMS),
            ("feature_normalization", feature_normalization, FEATURE_NORMALIZATIONS),
            ("grid_matching", grid_matching, GRID_MATCHINGS),
            ("token_weighting", token_weighting, TOKEN_WEIGHTINGS),
            ("teacher_weighting", teacher_weighting, TEACHER_WEIGHTINGS),
        ):
            if value not in choices:
                raise ValueError(f"`{option}` is {value!r}, expected one of {choices}.")
        if not 0 <= clip_share <= 1:
            raise ValueError(f"`clip_share` is {clip_share}; a share lies between 0 and 1.")
        if whitening_components < 1:
            raise ValueError(f"`whitening_components` is {whitening_components}; at least 1 is needed.")
        if not teachers:
            raise ValueError("There are no teachers; name at least one, or train without distillation.")
        if head_side == "student" and (grid_matching == "learned" or teacher_weighting != "equal"):
            raise ValueError(
                f"Heads on the student's side need `grid_matching` 'resample' and `teacher_weighting` 'equal', got "
                f"{grid_matching!r} and {teacher_weighting!r}: fixed targets are not in the student's space."
            )
        if head_side == "teacher" and head_form != "mlp":
            raise ValueError(
                f"`head_form` is {head_form!r}, but `head_side` {head_side!r} has adapters, which have no other form "
                "than 'mlp'. Set `head_side` to 'student', or leave `head_form` out."
            )
        if CLIP not in teachers and (token_weighting != "none" or teacher_weighting != "equal"):
            raise ValueError(
                f"`token_weighting` {token_weighting!r} and `teacher_weighting` {teacher_weighting!r} look at the CLS "
                f"token of a teacher named {CLIP!r}; there are only {list(teachers)}. Add it, or choose 'none' and "
                "'equal'."
            )
        student_grid = (student_grid[0], student_grid[1])
        self.student_width, self.student_grid = student_width, student_grid
        self.token_weighting, self.teacher_weighting = token_weighting, teacher_weighting
        self.clip_share = clip_share
        self.teachers = {name: (width, (grid[0], grid[1])) for name, (width, grid) in teachers.items()}
        kwargs = {
            "feature_normalization": feature_normalization,
            "whitening_components": whitening_components,
            "grid_matching": grid_matching,
        }
        for name, (width, grid) in self.teachers.items():
            if "." in name or hasattr(self, name):
                raise ValueError(f"A teacher cannot be named {name!r}, which is no state-dict key; rename it.")
            if name == CLIP and head_side == "teacher" and (width, grid) != (student_width, student_grid):
                raise ValueError(
                    f"Teacher {CLIP} has width {width} on {grid}, the student {student_width} on {student_grid}: "
                    "it must be the model that the student started from. Give another model another name."
                )
            if name == CLIP and token_weighting != "none" and grid != student_grid:
                raise ValueError(
                    f"Teacher {CLIP} has the grid {grid}, the student {student_grid}: its attention cannot weigh the "
                    "student's tokens. Use one image size, or set `token_weighting` to 'none'."
                )
            if head_side == "student":
                self[name] = StudentHead(width, grid, student_width, student_grid, head_form, **kwargs)
            elif name == CLIP:
                self[name] = Target(width, grid, student_grid)
            else:
                self[name] = TeacherAdapter(width, grid, student_width, student_grid, **kwargs)

    def forward(self, student_tokens: torch.Tensor, features: "Mapping[str, TeacherFeatures]") -> DistillationOutput:
        """
        The distillation loss of each image, before `lambda_kd`.

        Args:
            student_tokens (`torch.Tensor` of shape `(batch_size, num_tokens, student_width)`): Patches, without CLS.
            features: By teacher, for the same images.

        Raises:
            ValueError: if student or teachers are not what the heads were built for, with both shapes; if statistics
                were not measured yet; or if the CLIP teacher gave no CLS token where it is needed.
        """
        self._check_inputs(student_tokens, features)
        cls, cls_attention = self._clip_outputs(features)
        weights = None if cls_attention is None else token_weights(cls_attention, self.token_weighting)
        losses, targets = {}, {}
        for name in self.teachers:
            losses[name], targets[name] = self._compare(name, student_tokens, features[name].tokens, weights)
        shares = teacher_weights(cls, targets, self.teacher_weighting, self.clip_share)
        loss = torch.stack([shares[name] * losses[name] for name in losses]).sum(dim=0)
        return DistillationOutput(
            loss,
            {name: value.detach() for name, value in losses.items()},
            {name: value.detach() for name, value in shares.items()},
        )

    def _compare(
        self, name: str, student_tokens: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One teacher's loss `(batch_size,)` and the mean of its target's tokens `(batch_size, 1, num_channels)`."""

        def compare(
            student_tokens: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            student, target = self[name](student_tokens, tokens)
            loss = distillation_loss(student, target, weights, self.token_weighting)
            return loss, target.mean(dim=1, keepdim=True, dtype=torch.float32)

        if max(tokens.shape[1], student_tokens.shape[1]) * self.student_width <= LARGE_FEATURES:
            return compare(student_tokens, tokens, weights)
        sizes = [(len(tokens) + part) // NUM_PARTS for part in range(NUM_PARTS)]
        weight_parts = [None] * NUM_PARTS if weights is None else weights.split(sizes)
        parts = zip(student_tokens.split(sizes), tokens.detach().split(sizes), weight_parts, strict=True)
        # Computed again in the backward: an adapter's activations have the size of the teacher's features
        compared = [checkpoint(compare, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        loss, mean = (torch.cat(values) for values in zip(*compared, strict=True))
        return loss, mean

    def _check_inputs(self, student_tokens: torch.Tensor, features: "Mapping[str, TeacherFeatures]") -> None:
        if set(features) != set(self.teachers):
            raise ValueError(
                f"Features of {sorted(features)} were given, those of {sorted(self.teachers)} are needed."
            )
        height, width = self.student_grid
        if tuple(student_tokens.shape[1:]) != (height * width, self.student_width):
            raise ValueError(
                f"The student gave {student_tokens.shape[1]} tokens of width {student_tokens.shape[2]}; the distiller "
                f"was built for {height * width} ({height} x {width}) of width {self.student_width}."
            )
        for name, (width, grid) in self.teachers.items():
            tokens = features[name].tokens
            if tuple(features[name].grid) != grid or tuple(tokens.shape[1:]) != (grid[0] * grid[1], width):
                raise ValueError(
                    f"Teacher {name} gave {tokens.shape[1]} tokens on a grid of {tuple(features[name].grid)} and of "
                    f"width {tokens.shape[2]}; its head was built for {grid[0] * grid[1]} on {grid} of width {width}. "
                    "Keep the teacher and its image size, or start a new distiller."
                )
            if len(tokens) != len(student_tokens):
                raise ValueError(f"Teacher {name} saw {len(tokens)} images, the student {len(student_tokens)}.")
            if self[name].needs_statistics:
                raise ValueError(
                    f"The statistics of teacher {name} are not measured yet: call `fit_statistics` or `load` first."
                )

    def _clip_outputs(
        self, features: "Mapping[str, TeacherFeatures]"
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The CLS embedding and the CLS attention of the CLIP teacher, each if the weights in use need it."""
        outputs: list[torch.Tensor | None] = [None, None]
        for index, (option, value, unneeded, field) in enumerate(
            (
                ("teacher_weighting", self.teacher_weighting, "equal", "cls"),
                ("token_weighting", self.token_weighting, "none", "cls_attention"),
            )
        ):
            if value == unneeded:
                continue
            output = getattr(features[CLIP], field)
            if output is None:
                raise ValueError(
                    f"`{option}` {value!r} needs `{field}` of teacher {CLIP}, which gave none; choose {unneeded!r}."
                )
            outputs[index] = output.detach()
        return outputs[0], outputs[1]

    @property
    def needs_statistics(self) -> bool:
        """Whether [`Distiller.fit_statistics`] has to be called before the first forward."""
        return any(target.needs_statistics for target in self.values())

    @torch.no_grad()
    def fit_statistics(self, batches: "Iterable[Mapping[str, TeacherFeatures]]") -> None:
        """
        Measure mean, variance and principal components of the teachers' features over a sample, in one pass. Every
        process must be given the same sample.

        Raises:
            ValueError: naming the teacher, if the sample cannot give them.
        """
        moments = {
            name: Moments(name, target)
            for name, target in self.items()
            if isinstance(target, Target) and target.buffer_names
        }
        for batch in batches:
            for name in moments:
                moments[name].add(batch[name].tokens)
        for name in moments:
            moments[name].set_statistics()

    def save(self, path: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """
        Write weights and statistics as safetensors, under a temporary name first.

        Args:
            path: The file, `distiller.safetensors` by custom.
            state_dict: Gathered weights, where the module's own are spread over processes.

        Raises:
            ValueError: if keys are missing or left over, weights are spread, or statistics were not measured.
        """
        own = self.state_dict()
        state_dict = own if state_dict is None else state_dict
        if missing_or_unexpected := sorted(own.keys() ^ state_dict.keys()):
            raise ValueError(
                f"The state dict to save is not the distiller's; missing or left over: {missing_or_unexpected}."
            )
        if spread := [key for key, value in state_dict.items() if isinstance(value, DTensor) or not value.numel()]:
            raise ValueError(f"{spread} are spread over processes; gather them and give them as `state_dict`.")
        if self.needs_statistics:
            raise ValueError("The teachers' statistics are not measured yet; call `fit_statistics` before saving.")
        with new_file(path) as temporary:
            tensors = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
            save_file(tensors, temporary, metadata={"format": "pt"})

    def load(self, path: str | Path) -> None:
        """
        Read what [`Distiller.save`] wrote; to be called before a module is spread over processes.

        Raises:
            ValueError: if the file is missing, or lacks keys, has others, other shapes, or values that are not finite;
                listing them. Nothing is changed then.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path} is missing: without it adapters and heads would start anew. Restore it.")
        loaded, own = load_file(path), self.state_dict()
        shapes = {
            key: (tuple(loaded[key].shape), tuple(own[key].shape))
            for key in sorted(loaded.keys() & own.keys())
            if loaded[key].shape != own[key].shape
        }
        missing, unexpected = sorted(own.keys() - loaded.keys()), sorted(loaded.keys() - own.keys())
        if missing or unexpected or shapes:
            raise ValueError(
                f"{path} does not fit the distiller: missing {missing}, left over {unexpected}, other shapes (in the "
                f"file, needed) {shapes}. Use the teachers, image sizes and preset it was trained with."
            )
        if bad := [key for key, value in loaded.items() if not value.isfinite().all()]:
            raise ValueError(f"{path} has values that are not finite in {bad}; use an earlier checkpoint.")
        self.load_state_dict(loaded)
