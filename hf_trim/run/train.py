"""One training of a recipe: settings → training → evaluation → output folder → Hub."""

import json

from hf_trim.files import write_json
from hf_trim.hub.model_card import plot_curves, render_card, summarize_training
from hf_trim.hub.push import push_folder, save_arguments
from hf_trim.run.clock import samples_per_second, train_seconds
from hf_trim.run.recipe import Job, RecipeError
from hf_trim.run.records import UNITS
from hf_trim.run.trainer import RecipeTrainer, choose_metric, load_job_data, make_trainer, test_metrics
from hf_trim.trainer.checkpoints import last_complete_checkpoint


def check_settings(job: Job) -> None:
    """
    Refuse an output folder whose runs had other settings. In a new folder, write the settings down.

    Args:
        job ([`Job`]): The recipe.

    Raises:
        [`RecipeError`]: If the settings differ.
    """
    path = job.output_dir / "settings.json"
    # As they look after JSON, so that a tuple equals the list that was read back.
    settings = json.loads(json.dumps(job.settings))
    if not path.is_file():
        write_json(path, settings)
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise RecipeError(f"{path} is not valid JSON: delete the folder, or choose another --output_dir.") from None
    changed = [
        f"{name} was {saved.get(name, 'not set')!r} and is {settings.get(name, 'not set')!r}"
        for name in sorted(saved.keys() | settings.keys())
        if saved.get(name) != settings.get(name)
    ]
    if changed:
        raise RecipeError(
            f"{job.output_dir} holds runs with other settings ({'; '.join(changed)}): choose another --output_dir, or "
            "delete the folder."
        )


def train(job: Job) -> None:
    """
    Train a recipe once, evaluate it on the test split, and save the same files as the examples of transformers. An
    interrupted training continues from its last checkpoint. A finished one is not repeated.

    Args:
        job ([`Job`]): The recipe.
    """
    results = job.output_dir / "all_results.json"
    if results.is_file():
        print(f"Finished before; choose another --output_dir to train again. {results}:\n{results.read_text()}")
        return
    args = job.training
    checkpoint = args.resume_from_checkpoint or last_complete_checkpoint(job.output_dir)
    data = load_job_data(job)
    trainer = make_trainer(job, data, {}, args.seed, job.output_dir, args.push_to_hub)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics["train_seconds"] = train_seconds(trainer.state.log_history)
    metrics.update(samples_per_second(trainer))
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics, combined=False)
    tested = test_metrics(trainer, data)
    trainer.log_metrics("eval", tested)
    trainer.save_metrics("eval", tested, combined=False)
    save_run(job, trainer, {**metrics, **tested})
    name = choose_metric(data).name
    print(f"Test {name} {tested[f'eval_{name}']:.2f}{UNITS[name]}. Model and results are in {job.output_dir}.")


def save_run(job: Job, trainer: RecipeTrainer, metrics: dict) -> None:
    """
    Save a finished training in the recipe's folder: model, arguments, trainer state, plot, model card and results.

    Args:
        job ([`Job`]): The recipe.
        trainer ([`RecipeTrainer`]): After training and evaluation.
        metrics (`dict`): All metrics of training and evaluation.
    """
    folder = job.output_dir
    trainer.save_model(str(folder))
    if not trainer.is_world_process_zero():
        return
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    save_arguments(trainer.args, folder)
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
        split="the test split",
        train_seconds=train_seconds(trainer.state.log_history),
        includes_evaluation=False,
        command=job.command,
    )
    plot_curves(summary, folder / "curves.png")
    render_card(summary, str(folder), folder).save(folder / "README.md")
    write_json(folder / "run.json", summary)
    # Written last, because this file marks the training as finished.
    write_json(folder / "all_results.json", metrics)


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
    print(f"Pushed to {push_folder(job.output_dir, json.loads(path.read_text(encoding='utf-8')), job.training)}")
