"""`push_to_hub: true`: what a run publishes, and when."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from hub.push_commit import create_repository
from train.config import MoveKDSFTConfig


class PublishingMixin(Trainer):
    """
    Mixin before a trainer that publishes with [`hub.push_checkpoint.push`], once at the end of the run. Trainer would
    send whole folders with the optimizer's state at every save.
    """

    def take_token(self, args: MoveKDSFTConfig) -> None:
        """Keep the token out of the arguments, which Trainer saves with every checkpoint."""
        self.hub_token, args.hub_token = args.hub_token, None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Also refuse a public repository if a private one is asked for, before training."""
        token = token or self.hub_token
        super().init_hf_repo(token, private)
        if self.hub_model_id is not None:
            private = self.args.hub_private_repo if private is None else private
            create_repository(HfApi(token=token), self.hub_model_id, private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Send nothing during the run."""

    def push_to_hub(self, commit_message: str | None = None, blocking: bool = True, **kwargs: Any) -> str | None:
        """Save the model and [`publish`] it. Always waits for the upload."""
        self.save_model(_internal_call=True)
        return self.publish(commit_message, **kwargs)

    def publish(
        self,
        commit_message: str | None = None,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str | None:
        """
        Publish `output_dir` on the branch `hub_revision`, `main` by default.

        If the run knows its best checkpoint (`metric_for_best_model`), the checkpoint goes to the branch `best`. With
        `load_best_model_at_end` the output folder is the best, and the last checkpoint goes to the branch `last`.

        Returns:
            The URL of the first commit; `None` on all processes but the first.
        """
        if not self.is_world_process_zero():
            return None
        from hub.push_checkpoint import push

        private = self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        branches: list[tuple[str, str | None]] = [(self.args.output_dir, revision or self.args.hub_revision)]
        best, last = self.state.best_model_checkpoint, get_last_checkpoint(self.args.output_dir)
        if best is not None and not self.args.load_best_model_at_end:
            branches.append((best, "best"))
        elif best is not None and last is not None and Path(last).resolve() != Path(best).resolve():
            branches.append((last, "last"))
        urls = [
            push(
                folder,
                self.hub_model_id,
                private=private,
                revision=branch,
                token=token or self.hub_token,
                commit_message=commit_message or f"The model after {self.state.global_step} steps",
            )
            for folder, branch in branches
        ]
        return urls[0]
