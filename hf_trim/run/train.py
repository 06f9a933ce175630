"""One training of a recipe: settings → training → evaluation → output folder → Hub."""

import json
import sys
from pathlib import Path

from hf_trim.data import Data
from hf_trim.files import write_json
from hf_trim.hub.model_card import plot_curves, render_card, shown_metrics, summarize_training
from hf_trim.hub.push import push_folder, save_arguments
from hf_trim.messages import wrap
from hf_trim.run.chatter import write_chatter_to
from hf_trim.run.clock import samples_per_second, train_seconds
from hf_trim.run.folder import arm_of, claim_folder, clear_folder
from hf_trim.run.memory_files import write_memory
from hf_trim.run.metrics import describe_classes
from hf_trim.run.progress import describe_checkpoint
from hf_trim.run.recipe import Job, RecipeError, user_errors
from hf_trim.run.records import UNITS, used_hardware
from hf_trim.run.summary import read_summary
from hf_trim.run.trackers import FinalTest, end_run
from hf_trim.run.trainer import RecipeTrainer, load_job_data, make_trainer
from hf_trim.trainer.checkpoints import last_complete_checkpoint


def train(job: Job) -> None:
    """
    Train a recipe once, evaluate it on the test split, and save the same files as the examples of transformers. An
    interrupted training continues from its last checkpoint. A finished one is not repeated.

    Args:
        job ([`Job`]): The recipe.
    """
    results = job.output_dir / "all_results.json"
    if results.is_file() and not job.run.overwrite:
        if job.training.process_index == 0:
            result = _describe_results(json.loads(results.read_text(encoding="utf-8")))
            print(wrap(f"Finished before: {result}. The results are in {job.output_dir}.", sys.stdout))
            advice = "To train again, choose another --output_dir, or replace what is there with --overwrite."
            print(wrap(advice, sys.stdout))
        return
    data = load_job_data(job)
    trainer = make_trainer(job, data, {}, job.training.seed, job.output_dir, job.training.push_to_hub)
    if job.run.overwrite:
        clear(job, trainer)
    metrics, tested = start(job, data, trainer, job.output_dir, arm_of(job.training.trim_select))
    metrics["train_seconds"] = train_seconds(trainer.state.log_history)
    metrics.update(samples_per_second(trainer))
    trainer.save_metrics("train", metrics, combined=False)
    trainer.save_metrics("eval", tested, combined=False)
    save_run(job, data, trainer, {**metrics, **tested}, tested, arm_of(job.training.trim_select))
    if trainer.is_world_process_zero():
        classes = describe_classes(data)
        majority = f" (always the most frequent class: {classes['majority_error']:.2f} %)" if classes else ""
        result = f"{_describe_results(tested).capitalize()}{majority}."
        print(wrap(f"{result} Model and results are in {job.output_dir}.", sys.stdout))
        if classes and tested["eval_error"] >= classes["majority_error"]:
            print("Warning: the model is no better than always the most frequent class.")


def _describe_results(results: dict) -> str:
    name = next(name for name in UNITS if f"eval_{name}" in results)
    return f"test {name} {results[f'eval_{name}']:.2f}{UNITS[name]}"


def clear(job: Job, trainer: RecipeTrainer) -> None:
    """
    Delete what earlier runs left in the output folder. Only once it is known that the new one can start.

    Args:
        job ([`Job`]): The recipe.
        trainer ([`RecipeTrainer`]): The trainer of its first run.
    """
    if trainer.is_world_process_zero():
        clear_folder(job.output_dir)
    trainer.accelerator.wait_for_everyone()


def start(
    job: Job, data: Data, trainer: RecipeTrainer, folder: Path, model_arm: str | None = None
) -> tuple[dict, dict]:
    """
    Train, from the last complete checkpoint if there is one, and test.

    Args:
        job ([`Job`]): The recipe.
        data ([`Data`]): Its data.
        trainer ([`RecipeTrainer`]): The trainer.
        folder (`Path`): The folder of its checkpoints.
        model_arm (`str`, *optional*): What the model is, if the output folder will hold this one and no other.

    Returns:
        `tuple[dict, dict]`: Metrics of the training, and of the test.
    """
    if trainer.is_world_process_zero():
        claim_folder(job, model_arm)
        write_chatter_to(job.output_dir / "run.log")
    checkpoint = trainer.args.resume_from_checkpoint or last_complete_checkpoint(folder)
    if checkpoint is not None and trainer.is_world_process_zero():
        note = describe_checkpoint(checkpoint, trainer.args.num_train_epochs)
        print(f"{note[0].upper()}{note[1:]}", flush=True)
    test = FinalTest(trainer, data)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    end_run()
    return metrics, test.metrics


def save_run(job: Job, data: Data, trainer: RecipeTrainer, metrics: dict, tested: dict, arm: str) -> None:
    """
    Save a finished training in the recipe's folder: model, arguments, trainer state, plot, model card and results.

    Args:
        job ([`Job`]): The recipe.
        data ([`Data`]): Its data.
        trainer ([`RecipeTrainer`]): After training and evaluation.
        metrics (`dict`): All metrics of training and evaluation.
        tested (`dict`): Those of the test alone.
        arm (`str`): What it is, one of `ARMS`.
    """
    folder = job.output_dir
    trainer.save_model(str(folder))
    if not trainer.is_world_process_zero():
        return
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    save_arguments(trainer.args, folder)
    summary = {**summarize(job, data, trainer, tested), "arm": arm}
    plot_curves(summary, folder / "curves.png")
    if job.training.trim_memory:
        write_memory(job, data, trainer.trim_memory, folder)
    write_json(folder / "run.json", summary)
    write_card(folder)
    # Written last, because this file marks the training as finished.
    write_json(folder / "all_results.json", metrics)


def summarize(job: Job, data: Data, trainer: RecipeTrainer, tested: dict) -> dict:
    """
    Collect what the model card says about a training of a recipe.

    Args:
        job ([`Job`]): The recipe.
        data ([`Data`]): Its data.
        trainer ([`RecipeTrainer`]): After its training.
        tested (`dict`): Metrics of the test.

    Returns:
        `dict`: The summary, as [`~hf_trim.hub.model_card.summarize_training`] returns it.
    """
    classes, shown = describe_classes(data), shown_metrics(tested)
    if not classes.get("is_unbalanced"):
        shown.pop("macro_f1", None)  # nearly the accuracy
    summary = summarize_training(
        trainer,
        (job.training.hub_model_id or job.name).split("/")[-1],
        license=job.run.license,
        finetuned_from=job.model.hub_name(),
        dataset=job.data.title(),
        dataset_tags=job.data.hub_name(),
        dataset_args=job.data.dataset_config_name,
    )
    summary.update(
        origin=job.model.origin(),
        metrics=shown,
        majority_error=classes.get("majority_error"),
        split="the test split",
        train_seconds=train_seconds(trainer.state.log_history),
        includes_evaluation=False,
        command=job.command,
        recipe=job.own_recipe,
        hardware=used_hardware(),
    )
    # What replaces the optimizer and the schedule of `Trainer` is not among its hyperparameters.
    if job.run.l2_weight_decay is not None:
        summary["hyperparameters"]["optimizer"] = f"Adam with an L2 penalty of {job.run.l2_weight_decay}"
    if job.run.lr_milestones is not None:
        epochs = ", ".join(f"{epoch:g}" for epoch in job.run.lr_milestones)
        summary["hyperparameters"]["lr_scheduler_type"] = f"times {job.run.lr_gamma} after the epochs {epochs}"
        summary["hyperparameters"].pop("lr_scheduler_warmup_steps", None)
    if job.data.label_noise:
        summary["hyperparameters"]["label_noise"] = (
            f"{100 * job.data.label_noise:g} % of the training labels were wrong"
        )
    return summary


def write_card(folder: Path) -> None:
    """
    Write the model card of a finished training, with all records of a comparison that are there. Does nothing if the
    folder holds no model.

    Args:
        folder (`Path`): The output folder.
    """
    path = folder / "run.json"
    if path.is_file():
        with user_errors():  # a record may be damaged
            card = render_card(read_summary(path), None, folder)
        card.save(folder / "README.md")


def push(job: Job) -> None:
    """
    Upload the folder of a finished recipe, together with its comparison if there is one.

    Args:
        job ([`Job`]): The recipe.

    Raises:
        [`RecipeError`]: If there is no finished training to push.
        [`PushError`]: If the upload fails.
    """
    path = job.output_dir / "run.json"
    if not (job.output_dir / "all_results.json").is_file() or not path.is_file():
        raise RecipeError(f"{job.output_dir} holds no finished training: run the recipe without --push_only first.")
    print(f"Pushed to {push_folder(job.output_dir, read_summary(path), job.training)}")
