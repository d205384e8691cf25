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
    Put in front of a trainer: publishes with [`hub.push_checkpoint.push`], once, at the end. Trainer alone would send
    whole folders, the optimizer's state included, at every save.
    """

    def take_token(self, args: MoveKDSFTConfig) -> None:
        """Before anything is saved: Trainer writes its arguments, the token among them, beside every checkpoint."""
        self.hub_token, args.hub_token = args.hub_token, None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in Trainer, but a public repository is refused at once where a private one is asked for."""
        token = token or self.hub_token
        super().init_hf_repo(token, private)
        if self.hub_model_id is not None:
            private = self.args.hub_private_repo if private is None else private
            create_repository(HfApi(token=token), self.hub_model_id, private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing is sent while the run goes on."""

    def push_to_hub(self, commit_message: str | None = None, blocking: bool = True, **kwargs: Any) -> str | None:
        """Save the model and [`publish`] it; `kwargs` are that method's. Always waits for the upload."""
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
        Publish what training has left in `output_dir`, on `hub_revision` (`main` by default).

        Where the run knows its best checkpoint (`metric_for_best_model`), that goes to the branch `best`. Under
        `load_best_model_at_end` the best is what training leaves, and the last checkpoint goes to the branch `last`.

        Returns:
            The URL of the first commit; `None` on any process but the first. No process waits for another.

        Raises:
            ValueError: as [`hub.push_checkpoint.push`]. Everything is on disk by then: `python hub/push.py` sends it.
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
