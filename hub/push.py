"""
Publish a checkpoint on the Hub, or its encoder alone, or the demo Space with it.

    python hub/push.py outputs/finetune me/my-student --dry-run     # checks everything and lists the files
    python hub/push.py outputs/finetune me/my-student --tag
    python hub/push.py outputs/finetune me/my-encoder --encoder-only --private
    python hub/push.py outputs/finetune me/my-student --space --space-hardware zero-a10g --space-secrets HF_TOKEN

Log in first (`hf auth login`, or `HF_TOKEN` in the environment). Only files on an allow-list are sent
(`hub/push_allowlist.py`): weights, configuration, processor, this package's code, the card with its pictures, the
metadata that the card is written from, and `distiller.safetensors`, with which others can continue the run. Optimizer
states, data and logs are not sent.
"""

import argparse
import os
import sys
from pathlib import Path


# Run as a script, Python puts hub/ first on the path instead of the repository
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])


def _from_environment(names: list[str]) -> dict[str, str]:
    if unset := [name for name in names if not os.environ.get(name)]:
        raise ValueError(f"Secrets are read from the environment, where {unset} are not set. Set them.")
    return {name: os.environ[name] for name in names}


def _variables(pairs: list[str]) -> dict[str, str]:
    if bad := [pair for pair in pairs if not pair.partition("=")[0] or "=" not in pair]:
        raise ValueError(f"The variables {bad} are not of the form NAME=VALUE.")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of the checkpoint")
    parser.add_argument("repo_id", metavar="repo", help="repository on the Hub: owner/name, or a name of your own")
    parser.add_argument("--encoder-only", action="store_true", help="publish the vision encoder alone")
    private_help = "create private repositories; the Space of a private model is private unless --no-private is given"
    parser.add_argument("--private", action=argparse.BooleanOptionalAction, help=private_help)
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--revision", help="branch, created if it does not exist; main by default")
    tag_help = "tag the commit, with v and this package's version if no name is given"
    parser.add_argument("--tag", nargs="?", const=True, help=tag_help)
    parser.add_argument("--dry-run", action="store_true", help="check everything, list the files, send nothing")
    parser.add_argument("--commit-message", help="title of the commit")
    parser.add_argument("--space", action="store_true", help="publish the demo Space too, with the pushed commit")
    parser.add_argument("--space-folder", type=Path, help="folder of the Space; spaces/ of this repository by default")
    parser.add_argument("--space-repo", help="name of the Space; that of the repository by default")
    parser.add_argument("--space-hardware", help="hardware of the Space, such as zero-a10g or t4-small")
    secrets_help = "environment variables whose values become the Space's secrets"
    parser.add_argument("--space-secrets", nargs="+", default=[], metavar="NAME", help=secrets_help)
    parser.add_argument("--space-variables", nargs="+", default=[], metavar="NAME=VALUE", help="of the Space")
    given = vars(parser.parse_args(arguments))
    folder, repo, hardware = given.pop("space_folder"), given.pop("space_repo"), given.pop("space_hardware")
    secrets, variables = given.pop("space_secrets"), given.pop("space_variables")
    try:
        if not given["space"] and any((folder, repo, hardware, secrets, variables)):
            raise ValueError("The options of the Space do nothing without `--space`. Add it.")
        environment = _from_environment(secrets), _variables(variables)
        from hub.push_checkpoint import push  # imports torch, which takes seconds
        from hub.push_commit import SPACE_FOLDER, SpaceSettings

        if given["space"]:
            given["space"] = SpaceSettings(folder or SPACE_FOLDER, repo, hardware, *environment)
        push(**given)
    except (ValueError, ImportError, OSError, RecursionError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
