"""The distiller: adapters or heads between student and teachers, and their loss (MoVE-KD, arXiv 2501.01709)."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from modeling_movekd.files import new_file
from train.distillation.heads import StudentHead, Target, TeacherAdapter
from train.distillation.losses import (
    CLIP,
    DISTILLATION_LOSSES,
    TEACHER_WEIGHTINGS,
    TOKEN_WEIGHTINGS,
    distillation_loss,
    keep_teachers,
    teacher_weights,
    token_losses,
    token_weights,
)
from train.distillation.statistics import Moments, paley_prime


if TYPE_CHECKING:
    from train.teachers.features import TeacherFeatures

CHOICES = {
    "head_side": ("teacher", "student"),
    "head_form": ("mlp", "unit_linear"),
    "feature_normalization": ("none", "standardize", "whiten", "phi_s"),
    "grid_matching": ("learned", "resample", "upsample"),
    "distillation_loss": DISTILLATION_LOSSES,
    "summary_loss": DISTILLATION_LOSSES,
    "token_weighting": TOKEN_WEIGHTINGS,
    "teacher_weighting": TEACHER_WEIGHTINGS,
}
# Options that decide what the tensors of a file mean, and that their shapes do not tell
FILE_OPTIONS = ("head_side", "head_form", "feature_normalization", "grid_matching")
# If the features of one image have more values than this at the student's width, a batch is compared in parts, to save
# memory. The number of parts is fixed: under ZeRO-3 processes with fewer images must make the same calls.
LARGE_FEATURES = 2**19
NUM_PARTS = 8


class DistillationOutput(NamedTuple):
    """
    Args:
        loss (`torch.Tensor` of shape `(batch_size,)`): Weighted sum over the teachers, float32.
        teacher_losses (`dict[str, torch.Tensor]`): Each teacher's loss `(batch_size,)`, unweighted and detached: that
            of the patches, plus that of the summary if it has a head.
        teacher_weights (`dict[str, torch.Tensor]`): Each teacher's weight `(batch_size,)`, detached.
        summary_losses (`dict[str, torch.Tensor]`): The part of the summary in `teacher_losses`, of each teacher whose
            summary has a head.
    """

    loss: torch.Tensor
    teacher_losses: dict[str, torch.Tensor]
    teacher_weights: dict[str, torch.Tensor]
    summary_losses: dict[str, torch.Tensor]


class Distiller(nn.ModuleDict):
    """
    The adapters or heads of all teachers, by the teacher's name, and the distillation loss.

    If the other teachers have adapters, the teacher named `"clip"` must be the model that the student started from: it
    has no adapter, and the student is compared with its plain features. With heads on the student, `"clip"` has a head
    like the others.

    Args:
        student_width (`int`): Channels of the student's features.
        student_grid (`tuple[int, int]`): Height and width of the student's patch grid.
        teachers (`Mapping[str, tuple[int, tuple[int, int]]]`): Width and grid of each teacher's features.
        summary_widths (`Mapping[str, int]`, *optional*): Width of the summary of each teacher that has one.
        whitening_components (`int`, *optional*, defaults to 64): Principal components that `"whiten"` keeps of each
            teacher, at most all of them.
        head_side, head_form, feature_normalization, grid_matching, distillation_loss, summary_heads: As in
            [`MoveKDSFTConfig`].
        summary_loss, cosine_share, token_weighting, teacher_weighting, clip_share, teacher_dropping: As in
            [`MoveKDSFTConfig`].
    """

    def __init__(
        self,
        student_width: int,
        student_grid: tuple[int, int],
        teachers: Mapping[str, tuple[int, tuple[int, int]]],
        summary_widths: Mapping[str, int] | None = None,
        head_side: str = "teacher",
        head_form: str = "mlp",
        feature_normalization: str = "none",
        whitening_components: int = 64,
        grid_matching: str = "learned",
        distillation_loss: str = "mse",
        summary_heads: bool = False,
        summary_loss: str = "cosine",
        cosine_share: float = 0.9,
        token_weighting: str = "cls_attention",
        teacher_weighting: str = "cls_similarity",
        clip_share: float | None = 0.8,
        teacher_dropping: float = 0.0,
    ) -> None:
        super().__init__()
        self.student_width, self.student_grid = student_width, (student_grid[0], student_grid[1])
        self.teachers = {name: (width, (grid[0], grid[1])) for name, (width, grid) in teachers.items()}
        self.head_side, self.head_form = head_side, head_form
        self.token_weighting, self.teacher_weighting = token_weighting, teacher_weighting
        self.feature_normalization, self.grid_matching = feature_normalization, grid_matching
        self.distillation_loss, self.summary_loss, self.cosine_share = distillation_loss, summary_loss, cosine_share
        self.clip_share, self.teacher_dropping = clip_share, teacher_dropping
        if whitening_components < 1:
            raise ValueError(f"`whitening_components` is {whitening_components}. Set it to 1 or more.")
        self.summary_widths = {name: width for name, width in (summary_widths or {}).items() if summary_heads}
        self._check_options()
        self._check_teachers()
        if summary_heads and not self.summary_widths:
            raise ValueError(
                f"`summary_heads` is true, but none of the teachers {list(self.teachers)} has a [CLS] token or a "
                "pooled feature. Set it to false, or add a teacher that has one."
            )
        kwargs: dict[str, Any] = {
            "feature_normalization": feature_normalization,
            "whitening_components": whitening_components,
            "grid_matching": grid_matching,
        }
        student = student_width, self.student_grid
        for name, (width, grid) in self.teachers.items():
            if head_side == "student":
                self[name] = StudentHead(width, grid, *student, head_form, **kwargs)
            elif name == CLIP:
                self[name] = Target(width, grid, self.student_grid)
            else:
                self[name] = TeacherAdapter(width, grid, *student, **kwargs)
        cell = (1, 1)
        for name in self.teachers:  # after the heads of the patches, which are the same with and without these
            if name in self.summary_widths:
                self[name].summary = StudentHead(
                    self.summary_widths[name], cell, student_width, cell, head_form, **kwargs
                )
        for name, field, target in self._targets():
            if feature_normalization == "phi_s" and paley_prime(target.target_width) is None:
                raise ValueError(
                    f"Teacher {name} has {target.target_width} channels in its {field}, for which "
                    "`feature_normalization` 'phi_s' has no Hadamard matrix. Choose 'standardize' or 'whiten'."
                )

    def _targets(self) -> Iterator[tuple[str, str, Target]]:
        """Each target, with its teacher's name and the field of [`TeacherFeatures`] that it is made from."""
        for name, target in self.items():
            assert isinstance(target, Target)
            yield name, "tokens", target
            if target.summary is not None:
                yield name, "summary", target.summary

    def _check_options(self) -> None:
        for option, choices in CHOICES.items():
            if (value := getattr(self, option)) not in choices:
                raise ValueError(f"`{option}` is {value!r}, expected one of {choices}.")
        for option in ("clip_share", "cosine_share", "teacher_dropping"):
            if (share := getattr(self, option)) is not None and not 0 <= share <= 1:
                raise ValueError(f"`{option}` is {share}. Set it between 0 and 1.")
        if self.head_side == "student" and (self.grid_matching == "learned" or self.teacher_weighting != "equal"):
            raise ValueError(
                f"Heads on the student need `grid_matching` 'resample' or 'upsample' and `teacher_weighting` 'equal', "
                f"got {self.grid_matching!r} and {self.teacher_weighting!r}."
            )
        if self.grid_matching == "upsample" and (self.head_side == "teacher" or self.token_weighting != "none"):
            raise ValueError(
                f"`grid_matching` is 'upsample' with `head_side` {self.head_side!r} and `token_weighting` "
                f"{self.token_weighting!r}: only heads on the student can be compared on another grid than the "
                "student's, where its tokens have no weights. Set 'student' and 'none', or choose 'resample'."
            )
        if self.head_side == "teacher" and self.head_form != "mlp":
            raise ValueError(
                f"`head_form` is {self.head_form!r}, but `head_side` {self.head_side!r} has adapters, which have no "
                "other form than 'mlp'. Set `head_side` to 'student', or leave `head_form` out."
            )

    def _check_teachers(self) -> None:
        if not self.teachers:
            raise ValueError("There are no teachers. Name at least one, or train without distillation.")
        if bad := [name for name in self.teachers if "." in name or hasattr(self, name)]:
            raise ValueError(f"Teachers cannot be named {bad}, which are no valid module names. Rename them.")
        if self.teacher_dropping and len(self.teachers) == 1:
            raise ValueError(
                f"`teacher_dropping` is {self.teacher_dropping}, but {list(self.teachers)} is the only teacher, which "
                "is never dropped. Set it to 0, or add teachers."
            )
        if CLIP not in self.teachers:
            if self.token_weighting != "none" or self.teacher_weighting != "equal":
                raise ValueError(
                    f"`token_weighting` {self.token_weighting!r} and `teacher_weighting` {self.teacher_weighting!r} "
                    f"need the CLS token of a teacher named {CLIP!r}; there are only {list(self.teachers)}. Add it, "
                    "or choose 'none' and 'equal'."
                )
            return
        width, grid = self.teachers[CLIP]
        if self.head_side == "teacher" and (width, grid) != (self.student_width, self.student_grid):
            raise ValueError(
                f"Teacher {CLIP} has width {width} on {grid}, the student {self.student_width} on "
                f"{self.student_grid}, but the student must have started from it. Give another model another name."
            )
        if self.token_weighting != "none" and grid != self.student_grid:
            raise ValueError(
                f"Teacher {CLIP} has the grid {grid}, the student {self.student_grid}: its attention cannot weigh the "
                "student's tokens. Use one image size, or set `token_weighting` to 'none'."
            )

    @property
    def loss_names(self) -> list[str]:
        """Names of the losses of [`DistillationOutput`]: each teacher, then the summaries as `{teacher}/summary`."""
        return [*self.teachers, *(f"{name}/summary" for name in self.teachers if name in self.summary_widths)]

    def forward(
        self,
        student_tokens: torch.Tensor,
        features: "Mapping[str, TeacherFeatures]",
        student_summary: torch.Tensor | None = None,
        student_grid: tuple[int, int] | None = None,
    ) -> DistillationOutput:
        """
        Compute the distillation loss of each image, before `lambda_kd`.

        Args:
            student_tokens (`torch.Tensor` of shape `(batch_size, num_tokens, student_width)`): Features of the
                student's patches, without CLS. With a first dimension `num_teachers`, each teacher is compared with
                features of its own.
            features (`Mapping[str, TeacherFeatures]`): Each teacher's features of the same images.
            student_summary (`torch.Tensor` of shape `(batch_size, student_width)`, *optional*): The student's [CLS]
                token, or the mean of its patches; needed with `summary_heads`.
            student_grid (`tuple[int, int]`, *optional*): Grid of `student_tokens`, if it is not the student's own.
        """
        # Each teacher's own features, or the same for all
        if student_tokens.dim() == 3:
            student_tokens = student_tokens.unsqueeze(0).expand(len(self.teachers), -1, -1, -1)
        if student_summary is not None and student_summary.dim() == 2:
            student_summary = student_summary.unsqueeze(0).expand(len(self.teachers), -1, -1)
        self._check_inputs(student_tokens[0], features, student_summary, student_grid)
        cls = self._clip_output(features, "teacher_weighting", "cls")
        cls_attention = self._clip_output(features, "token_weighting", "cls_attention")
        weights = None if cls_attention is None else token_weights(cls_attention, self.token_weighting)
        losses, targets, summaries = {}, {}, {}
        for index, name in enumerate(self.teachers):
            losses[name], targets[name] = self._compare(
                name, student_tokens[index], features[name].tokens, weights, student_grid
            )
            if name in self.summary_widths and student_summary is not None:
                summaries[name] = self._compare_summary(name, student_summary[index], features[name].summary)
                losses[name] = losses[name] + summaries[name]
        shares = teacher_weights(cls, targets, self.teacher_weighting, self.clip_share)
        if self.training and self.teacher_dropping:
            weighted, unweighted = torch.stack(list(shares.values())), torch.stack(list(losses.values())).detach()
            # A teacher without a weight is not the one to keep
            weighted = weighted * keep_teachers(unweighted.where(weighted > 0, -torch.inf), self.teacher_dropping)
            shares = dict(zip(losses, weighted / weighted.sum(dim=0), strict=True))
        loss = torch.stack([shares[name] * losses[name] for name in losses]).sum(dim=0)
        return DistillationOutput(
            loss,
            {name: value.detach() for name, value in losses.items()},
            {name: value.detach() for name, value in shares.items()},
            {name: value.detach() for name, value in summaries.items()},
        )

    def _compare_summary(self, name: str, student_summary: Any, summary: Any) -> torch.Tensor:
        """The loss `(batch_size,)` of a teacher's summary."""
        head: Any = self[name].summary
        student, target = head(student_summary.unsqueeze(1), summary.unsqueeze(1))
        return token_losses(student, target, self.summary_loss, self.cosine_share).squeeze(1)

    def _compare(
        self,
        name: str,
        student_tokens: torch.Tensor,
        tokens: torch.Tensor,
        weights: torch.Tensor | None,
        student_grid: tuple[int, int] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One teacher's loss `(batch_size,)`, and the mean of its target `(batch_size, 1, num_channels)`."""

        def compare(
            student_tokens: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            student, target = self[name](student_tokens, tokens, *grid)
            loss = distillation_loss(
                student, target, weights, self.token_weighting, self.distillation_loss, self.cosine_share
            )
            return loss, target.mean(dim=1, keepdim=True, dtype=torch.float32)

        grid = () if student_grid is None else (student_grid,)
        if max(tokens.shape[1], student_tokens.shape[1]) * self.student_width <= LARGE_FEATURES:
            return compare(student_tokens, tokens, weights)
        sizes = [(len(tokens) + part) // NUM_PARTS for part in range(NUM_PARTS)]
        weight_parts = [None] * NUM_PARTS if weights is None else weights.split(sizes)
        parts = zip(student_tokens.split(sizes), tokens.detach().split(sizes), weight_parts, strict=True)
        # Recompute in the backward, since the activations of an adapter are as large as the teacher's features
        compared = [checkpoint(compare, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        loss, mean = (torch.cat(values) for values in zip(*compared, strict=True))
        return loss, mean

    def _check_inputs(
        self,
        student_tokens: torch.Tensor,
        features: "Mapping[str, TeacherFeatures]",
        student_summary: torch.Tensor | None,
        student_grid: tuple[int, int] | None,
    ) -> None:
        if set(features) != set(self.teachers):
            raise ValueError(
                f"Features of {sorted(features)} were given, but those of {sorted(self.teachers)} are needed."
            )
        if student_grid is not None and (self.head_side == "teacher" or self.token_weighting != "none"):
            raise ValueError(
                f"The student has the grid {student_grid} in this step, but with `head_side` {self.head_side!r} and "
                f"`token_weighting` {self.token_weighting!r} it can have {self.student_grid} alone. Set 'student' and "
                "'none', or keep one image size."
            )
        if self.summary_widths and student_summary is None:
            raise ValueError("`summary_heads` is true, but no `student_summary` was given. Give the student's [CLS].")
        height, width = student_grid or self.student_grid
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
            summary, summary_width = features[name].summary, self.summary_widths.get(name)
            if summary_width is not None and (summary is None or summary.shape[1] != summary_width):
                raise ValueError(
                    f"Teacher {name} gave {'no summary' if summary is None else tuple(summary.shape)}; the head of "
                    f"its summary was built for {summary_width} channels. Keep the teacher, or start a new distiller."
                )
        for name, _, target in self._targets():
            if target.needs_statistics:
                raise ValueError(
                    f"The statistics of teacher {name} are not measured yet. Call `fit_statistics` or `load` first."
                )

    def _clip_output(self, features: "Mapping[str, TeacherFeatures]", option: str, field: str) -> torch.Tensor | None:
        """The CLS embedding or attention of the CLIP teacher; `None` if the weighting does not need it."""
        value, unneeded = getattr(self, option), "equal" if option == "teacher_weighting" else "none"
        if value == unneeded:
            return None
        if (output := getattr(features[CLIP], field)) is None:
            raise ValueError(
                f"`{option}` is {value!r}, which needs `{field}` of teacher {CLIP}, but the teacher gave none. Choose "
                f"{unneeded!r}."
            )
        return output.detach()

    @property
    def needs_statistics(self) -> bool:
        """Whether [`Distiller.fit_statistics`] must be called before the first forward."""
        return any(target.needs_statistics for _, _, target in self._targets())

    @torch.no_grad()
    def fit_statistics(self, batches: "Iterable[Mapping[str, TeacherFeatures]]") -> None:
        """
        Measure mean, variance and principal components of the teachers' features in one pass over a sample. All
        processes must get the same sample.
        """
        moments = {
            (name, field): Moments(name if field == "tokens" else f"{name} ({field})", target)
            for name, field, target in self._targets()
            if target.buffer_names
        }
        for batch in batches:
            for (name, field), measured in moments.items():
                values = getattr(batch[name], field)
                measured.add(values if field == "tokens" else values.unsqueeze(1))
        for measured in moments.values():
            measured.set_statistics()

    def save(self, path: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """
        Save weights and statistics as safetensors.

        Args:
            path (`str` or `Path`): The file.
            state_dict (`Mapping[str, torch.Tensor]`, *optional*): Gathered weights, if the module's are sharded.
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
            raise ValueError("The teachers' statistics are not measured yet. Call `fit_statistics` before saving.")
        with new_file(path) as temporary:
            tensors = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
            options = json.dumps({name: getattr(self, name) for name in FILE_OPTIONS})
            save_file(tensors, temporary, metadata={"format": "pt", "options": options})

    def load(self, path: str | Path) -> None:
        """
        Load what [`Distiller.save`] wrote, into a module that is not sharded.

        Raises:
            ValueError: if the file is missing or does not fit. Nothing is loaded then.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path} is missing, without which adapters and heads would start anew. Restore it.")
        with safe_open(path, "pt") as file:
            options = json.loads((file.metadata() or {}).get("options", "{}"))  # earlier versions wrote none
        if other := {name: value for name, value in options.items() if value != getattr(self, name, value)}:
            raise ValueError(
                f"{path} was trained with {other}, and this run asks for "
                f"{ {name: getattr(self, name) for name in other} }. Give the saved values, or start with new heads "
                "by `reset_distiller: true`."
            )
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
                f"file, needed) {shapes}. Use the teachers, image sizes and preset it was trained with; or start with "
                "new heads by `reset_distiller: true`."
            )
        if bad := [key for key, value in loaded.items() if not value.isfinite().all()]:
            raise ValueError(f"{path} has values that are not finite in {bad}. Use an earlier checkpoint.")
        self.load_state_dict(loaded)
