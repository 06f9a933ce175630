"""Pushing to the Hub: which files are uploaded, how a token is kept out of them, and one clear message on failure."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers import TrainingArguments

from hf_trim._compat import HubConnectionError
from hf_trim.files import write_json
from hf_trim.hub.model_card import plot_curves, render_card, summarize_training
from hf_trim.run.records import ARMS


logger = logging.getLogger(__name__)
# What the client of the Hub raises for a refusal and for a lost connection.
HUB_ERRORS = (HubConnectionError, HFValidationError, LocalTokenNotFoundError, ConnectionError, TimeoutError)
# Checkpoints, unfinished runs, and files that another process is writing.
NOT_UPLOADED = ["_*", "checkpoint-*", *(f"{arm}-seed*/*" for arm in ARMS), "*.lock", "*.log", "*.part"]
LOGIN_HINT = "log in with `hf auth login`, or set HF_TOKEN"


class PushError(OSError):
    """
    A push that failed. The message says why, and what to do.

    Args:
        message (`str`): The message for the user.
        refused (`bool`): Whether a second try fails in the same way until the user changes something.
    """

    def __init__(self, message: str, refused: bool):
        super().__init__(message)
        self.refused = refused


class UnsavedToken(str):
    """A token that becomes `None` when it is pickled, because `Trainer` pickles its arguments beside each model."""

    def __reduce__(self):
        return type(None), ()

    def __deepcopy__(self, memo):
        return self


def explain(error: Exception, repo: str) -> PushError:
    """
    Turn an error of the client into a message for the user.

    Args:
        error (`Exception`): One of `HUB_ERRORS`.
        repo (`str`): Name of the repository.

    Returns:
        [`PushError`]: The error with that message.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    refused = True
    if isinstance(error, LocalTokenNotFoundError):
        why = f"there is no token for the Hub: {LOGIN_HINT}"
    elif isinstance(error, OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set: unset it"
    elif isinstance(error, HFValidationError):
        why = f"'{repo}' is no name for a repository: set hub_model_id to 'your-name/your-model'"
    elif status == 401:
        why = f"the Hub does not know the token (401): {LOGIN_HINT} to a valid one"
    elif status == 403:
        why = f"the token must not write to '{repo}' (403): take one with write access, or change hub_model_id"
    elif status == 404:
        why = f"there is no '{repo}' that this token may see (404): check hub_model_id and hub_revision"
    elif status == 400:
        why = f"the Hub refuses the content (400): {getattr(error, 'server_message', None) or error}".splitlines()[0]
    elif status == 409:
        why, refused = f"something else was written to '{repo}' at the same time (409): try again", False
    elif status == 429:
        why, refused = "too many requests (429): wait some minutes and try again", False
    elif status is not None:
        why, refused = f"the Hub answered with status {status}: try again later", False
    else:
        why, refused = f"the connection to {constants.ENDPOINT} failed ({type(error).__name__}): try again", False
    return PushError(f"Nothing or not everything was pushed to the Hub, since {why}.", refused)


@contextmanager
def push_errors(repo: str, token: str | None = None, saved_in: str | Path | None = None) -> Iterator[None]:
    """
    Raise each error of the client in this context as a [`PushError`].

    Args:
        repo (`str`): Name of the repository.
        token (`str`, *optional*): The user's token. By default the user must be logged in.
        saved_in (`str` or `Path`, *optional*): The folder that holds everything, for the message.

    Raises:
        [`PushError`]: If there is no token, or the client raises one of `HUB_ERRORS`.
    """
    try:
        if not (token or get_token()):
            raise LocalTokenNotFoundError
        yield
    except PushError:
        raise
    except HUB_ERRORS as error:
        explained = explain(error, repo)
        where = "" if saved_in is None else f" Everything is saved in {saved_in}."
        raise PushError(f"{explained}{where}", explained.refused) from None


def save_arguments(args: TrainingArguments, folder: Path) -> None:
    """
    Write the arguments of a training, with its `trim_*` fields, as JSON. `Trainer` itself only pickles them.

    Args:
        args ([`~transformers.TrainingArguments`]): The arguments. Tokens and the output folder are left out.
        folder (`Path`): Where `training_args.json` is written.
    """
    write_json(folder / "training_args.json", {k: v for k, v in args.to_dict().items() if k != "output_dir"})


if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object  # the trainer is named beside the mixin, and comes after it


class PushMixin(TrainerBase):
    """The part of [`~hf_trim.trainer.trainer.TrimmingMixin`] that pushes to the Hub, with a model card of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.hub_token:
            self.args.hub_token = UnsavedToken(self.args.hub_token)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the weights of a timm model under timm's own names, so that timm loads them as well as transformers."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        is_timm = getattr(getattr(model, "config", None), "model_type", None) == "timm_wrapper"
        if is_timm and output_dir in (None, self.args.output_dir):
            state_dict = model.state_dict() if state_dict is None else state_dict
            state_dict = {name.removeprefix("timm_model."): value for name, value in state_dict.items()}
        super()._save(output_dir, state_dict)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Create the repository, as `Trainer` does before training if `push_to_hub` is set.

        Args:
            token (`str`, *optional*): Instead of `args.hub_token`.
            private (`bool`, *optional*): Instead of `args.hub_private_repo`.

        Raises:
            [`PushError`]: If the Hub refuses it. If the Hub cannot be reached, training starts all the same, and the
                push at its end tries again.
        """
        self.push_in_progress = None
        self._reported_jobs: list = []
        try:
            with push_errors(self._repo_name(), token or self.args.hub_token):
                super().init_hf_repo(token=token, private=private)
        except PushError as error:
            # `Trainer` calls this in its constructor, before it has a state. An outage must not stop it there.
            if error.refused or hasattr(self, "state"):
                raise
            logger.warning("%s Training starts without it.", error)

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs):
        """
        Save, and upload the model, its processing class, arguments, trainer state and model card.

        Args:
            commit_message (`str`, *optional*): What the commit says.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait for the end of the upload.
            token (`str`, *optional*): Instead of `args.hub_token`.
            revision (`str`, *optional*): The branch to commit to.
            kwargs: `private`, and arguments of [`~PushMixin.create_model_card`].

        Returns:
            `huggingface_hub.CommitInfo` or a future of one.

        Raises:
            [`PushError`]: If the push fails. Everything has been saved in `args.output_dir` by then.
        """
        self.save_model(_internal_call=True)
        self.save_state()
        if self.is_world_process_zero():
            save_arguments(self.args, Path(self.args.output_dir))
        with push_errors(self._repo_name(), token or self.args.hub_token, self.args.output_dir):
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)

    # `Trainer` names all of these arguments where it calls this, so their order is free.
    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:  # type: ignore[override]
        """
        Write the model card, `README.md`.

        Args:
            model_name (`str`, *optional*): The title.
            kwargs: The other arguments of `Trainer.create_model_card`: `language`, `license`, `tags`,
                `finetuned_from`, `tasks`, `dataset_tags`, `dataset`, `dataset_args`.
        """
        if self.is_world_process_zero():
            repo, folder = self.hub_model_id or self.args.hub_model_id, Path(cast(str, self.args.output_dir))
            summary = summarize_training(self, model_name or self._repo_name().split("/")[-1], **kwargs)
            plot_curves(summary, folder / "curves.png")
            render_card(summary, repo, folder).save(folder / "README.md")

    def _repo_name(self) -> str:
        # Without an output folder, `TrainingArguments` sets a default.
        return self.args.hub_model_id or Path(cast(str, self.args.output_dir)).absolute().name

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.hub_model_id is None and self.is_world_process_zero():
            try:
                self.init_hf_repo()
            except PushError as error:
                logger.warning("%s Training goes on.", error)
                return
        self._log_failed_pushes()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._log_failed_pushes()

    def _log_failed_pushes(self) -> None:
        """Log each failed push in the background. Nothing is lost: the next push uploads the same files again."""
        for job in getattr(getattr(self, "push_in_progress", None), "jobs", []):
            if job.done() and job not in self._reported_jobs and isinstance(job.exception(), HUB_ERRORS):
                logger.warning("A checkpoint: %s", explain(job.exception(), self._repo_name()))
                self._reported_jobs.append(job)


def push_folder(folder: Path, summary: dict, args: TrainingArguments) -> str:
    """
    Upload the folder of a finished training, with a model card that names the repository.

    Args:
        folder (`Path`): The folder.
        summary (`dict`): What [`~hf_trim.hub.model_card.summarize_training`] returned.
        args ([`~transformers.TrainingArguments`]): The arguments; their `hub_*` fields are used.

    Returns:
        `str`: Address of the repository.

    Raises:
        [`PushError`]: If the push fails.
    """
    repo = args.hub_model_id or folder.absolute().name
    with push_errors(repo, args.hub_token, folder):
        api = HfApi(token=args.hub_token)
        url = api.create_repo(repo, private=args.hub_private_repo, exist_ok=True)
        render_card(summary, url.repo_id, folder).save(folder / "README.md")
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message="End of training",
            ignore_patterns=NOT_UPLOADED,
            revision=args.hub_revision,
        )
    return str(url)
