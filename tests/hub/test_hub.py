"""Pushed to a Hub on 127.0.0.1 and loaded back; and every way in which that can fail."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load
from sklearn.datasets import load_digits
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForTokenClassification

from hf_trim import TrimmingArguments
from hf_trim.files import write_json
from hf_trim.hub.model_card import CALLS, _usage, render_card
from hf_trim.hub.push import UnsavedToken
from hf_trim.run.__main__ import main
from hf_trim.run.models import ModelArguments, load_processing_class
from tests.support.helpers import record
from tests.support.hub_server import TOKEN, Hub
from tests.support.recipes import IMAGE, TEXT, TIMM, TINY


class Session:
    """A process that talks to the Hub. Its output is searched for the token."""

    def __init__(self, hub, home):
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1",
                       "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "tests.support.hub_session"]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, token=TOKEN, **question):
        question["environment"] = {"HF_TOKEN": token} if token else {}
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert TOKEN not in answer["output"]
        return answer["status"], answer["output"]

    def run(self, *argv, **options):
        return self.ask(argv=[str(argument) for argument in argv], **options)

    def code(self, code):
        status, output = self.ask(code=code)
        assert status == 0, output
        return output


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def session(hub, tmp_path_factory):
    session = Session(hub, tmp_path_factory.mktemp("home"))
    yield session
    session.process.stdin.close()
    session.process.wait()


@pytest.fixture(autouse=True)
def healthy(hub):
    hub.failures.clear()


def write(folder, name, recipe):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def card_of(repo):
    return ModelCard(repo["files"]["README.md"].decode(), ignore_metadata_errors=False)


def usage_of(repo):
    return re.findall(r"```python\n(.*?)```", repo["files"]["README.md"].decode(), re.DOTALL)


def without_token(repo):
    return all(TOKEN.encode() not in content for content in repo["files"].values())


@pytest.mark.extended
def test_a_comparison_of_image_models_is_pushed_and_loads_back(hub, session, tmp_path):
    out = tmp_path / "out"
    options = ["--compare", "--seeds", "2", "--num_train_epochs", "2", "--output_dir", out, "--push_to_hub",
               "--hub_private_repo", "true", "--hub_token", TOKEN]  # fmt: skip
    status, output = session.run(write(tmp_path, "tiny", IMAGE), *options, token=None)
    assert status == 0 and f"Pushed to {hub.url}/tester/out" in output
    assert list(hub.repos) == ["tester/out"]  # and none for the runs of the comparison
    repo = hub.repos["tester/out"]
    assert repo["private"] and repo["commits"] == ["End of training"] and without_token(repo)
    assert {"README.md", "model.safetensors", "config.json", "preprocessor_config.json", "trainer_state.json",
            "training_args.json", "training_args.bin", "all_results.json", "curves.png", "comparison.png",
            "records/random-seed43.json"} <= set(repo["files"])  # fmt: skip
    assert not [name for name in repo["files"] if "checkpoint" in name or name.endswith(".lock")]
    assert json.loads(repo["files"]["training_args.json"])["trim_keep_end"] == 0.2

    card = card_of(repo)
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    assert card.data.tags == ["hf-trim", "generated_from_trainer"] and card.data.license is None
    accuracy = {result.metric_type: result.metric_value for result in card.data.eval_results}["accuracy"]
    assert accuracy == json.loads(repo["files"]["all_results.json"])["eval_accuracy"]
    assert (card.data.eval_results[0].dataset_name, card.data.model_name) == ("digits", "tiny")
    for line in ("| plain | 2 |", "| trimmed | 2 |", "| random | 2 |", "| 42 | ", "| 43 | ", "p fell from 1.0 to 0.2",
                 "python -m hf_trim.run tiny.yaml --compare --num_train_epochs 2 --seeds 2\n", "](curves.png)",
                 "](comparison.png)", "2 seeds tell nothing certain", "  hidden_size: 16"):  # fmt: skip
        assert line in card.text, line

    load_digits_image(tmp_path)
    (usage,) = usage_of(repo)
    code = f"import os\nos.chdir({str(tmp_path)!r})\n{usage}\nassert len(pipe('image.png')) == 5\n"
    code += "import io, safetensors.torch\nprint(safetensors.torch.save(pipe.model.state_dict()).hex())"
    assert_same_weights(bytes.fromhex(session.code(code).strip().splitlines()[-1]), repo["files"]["model.safetensors"])
    code = (
        "from huggingface_hub import ModelCard\nprint(ModelCard.load('tester/out').data.eval_results[0].metric_value)"
    )
    assert session.code(code).strip() == str(card.data.eval_results[0].metric_value)

    # Pushed again, it is not there twice; and it is not trained again either.
    status, output = session.run(write(tmp_path, "tiny", IMAGE), *options)
    assert status == 0 and repo["commits"] == ["End of training"]
    status, output = session.run(write(tmp_path, "tiny", IMAGE), *options, "--push_only", "--license", "mit")
    assert status == 0 and len(repo["commits"]) == 1  # the license was noted when it was trained


def load_digits_image(folder):
    from PIL import Image

    Image.fromarray((load_digits().images[0] * 15).astype("uint8")).resize((64, 64)).convert("RGB").save(
        folder / "image.png"
    )


def assert_same_weights(loaded, pushed):
    loaded, pushed = load(loaded), load(pushed)
    renamed = {name.replace("timm_model.", ""): value for name, value in loaded.items()}
    shapes = sorted(tuple(value.shape) for value in renamed.values())
    assert shapes == sorted(tuple(value.shape) for value in pushed.values())
    assert sorted(value.double().sum().item() for value in renamed.values()) == sorted(
        value.double().sum().item() for value in pushed.values()
    )


@pytest.mark.extended
def test_a_text_model_is_pushed_while_it_trains_with_its_checkpoint_and_tensorboard_logs(hub, session, tmp_path):
    options = ["--push_to_hub", "--hub_strategy", "checkpoint", "--hub_always_push", "--report_to", "tensorboard",
               "--hub_model_id", "tester/news", "--output_dir", tmp_path / "out"]  # fmt: skip
    status, output = session.run(write(tmp_path, "news", TEXT), *options)
    assert status == 0, output
    repo = hub.repos["tester/news"]
    assert without_token(repo) and not repo["private"] and repo["commits"][-1] == "End of training"
    assert "Training in progress, epoch 1" in repo["commits"]
    names = set(repo["files"])
    assert {"tokenizer.json", "model.safetensors", "last-checkpoint/trainer_state.json"} <= names
    assert [name for name in names if re.fullmatch(r"runs/.*/events\.out\.tfevents\..*", name)]
    card = card_of(repo)
    assert (card.data.pipeline_tag, card.data.model_name) == ("text-classification", "news")
    (usage,) = usage_of(repo)
    code = f"{usage}\nassert pipe('Rates rose.')[0]['label'] in {sorted(pipe_labels(repo))!r}\n"
    code += "import safetensors.torch\nprint(safetensors.torch.save(pipe.model.state_dict()).hex())"
    assert_same_weights(bytes.fromhex(session.code(code).strip().splitlines()[-1]), repo["files"]["model.safetensors"])


def pipe_labels(repo):
    return json.loads(repo["files"]["config.json"])["id2label"].values()


def test_a_timm_model_loads_back_through_transformers_and_through_timm(hub, session, tmp_path):
    options = ["--push_to_hub", "--hub_model_id", "tester/timm", "--output_dir", tmp_path / "out", "--hub_strategy",
               "end"]  # fmt: skip
    status, output = session.run(write(tmp_path, "timm", TIMM), *options)
    assert status == 0, output
    repo = hub.repos["tester/timm"]
    card = card_of(repo)
    assert card.data.library_name == "timm" and "transformers" in card.data.tags
    load_digits_image(tmp_path)
    through_transformers, through_timm = usage_of(repo)
    code = f"import os, torch\nos.chdir({str(tmp_path)!r})\n{through_transformers}\n{through_timm}\n"
    code += """
images = torch.rand(2, 3, 32, 32)
with torch.no_grad():
    theirs, ours = model(images), pipe.model.eval()(pixel_values=images).logits
assert theirs.shape == (2, 10) and torch.equal(theirs, ours), (theirs - ours).abs().max()
import safetensors.torch
print(safetensors.torch.save(model.state_dict()).hex())"""
    assert_same_weights(bytes.fromhex(session.code(code).strip().splitlines()[-1]), repo["files"]["model.safetensors"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A training that has ended, with its push to come."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write(folder, "tiny", TINY)
    assert main([str(recipe), "--num_train_epochs", "1", "--output_dir", str(folder / "out")]) == 0
    return recipe, folder / "out"


COMMIT, CREATE, PREUPLOAD = "/commit/", "/repos/create", "/preupload/"


@pytest.mark.parametrize(
    "failure, token, options, message",
    [
        (None, None, [], "there is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN"),
        (None, "hf_wrong", [], "the Hub does not know the token (401): log in"),
        (("POST", COMMIT, 401), TOKEN, [], "the Hub does not know the token (401)"),
        (None, TOKEN, ["--hub_model_id", "others/model"], "the token must not write to 'others/model' (403)"),
        (("POST", COMMIT, 403), TOKEN, [], "the token must not write to 'failing' (403): take one with write access"),
        (("POST", PREUPLOAD, 404), TOKEN, [], "there is no 'failing' that this token may see (404)"),
        (("POST", COMMIT, 409), TOKEN, [], "something else was written to 'failing' at the same time (409)"),
        (("POST", CREATE, 429), TOKEN, [], "too many requests (429): wait some minutes and try again"),
        (("POST", COMMIT, 429), TOKEN, [], "too many requests (429): wait some minutes and try again"),
        (("POST", CREATE, 503), TOKEN, [], "the Hub answered with status 503: try again later"),
        (("POST", COMMIT, "cut"), TOKEN, [], "the connection to http://127.0.0.1"),
        (("POST", PREUPLOAD, "cut"), TOKEN, [], "the connection to http://127.0.0.1"),
        (("POST", CREATE, "cut"), TOKEN, [], "the connection to http://127.0.0.1"),
        (None, TOKEN, ["--hub_model_id", "a--b..c"], "'a--b..c' is no name for a repository: set hub_model_id"),
    ],
)  # fmt: skip
def test_a_failed_push_loses_nothing_and_says_what_to_do(failure, token, options, message, hub, session, finished):
    recipe, out = finished
    hub.repos.pop("tester/failing", None)
    if failure:
        hub.fail(*failure)
    arguments = [recipe, "--num_train_epochs", "1", "--output_dir", out, "--push_only"]
    before = {path.name for path in out.iterdir()}
    status, output = session.run(*arguments, "--hub_model_id", "failing", *options, token=token)
    lines = [line for line in output.splitlines() if line.startswith("hf-trim: ")]
    assert status == 1 and len(lines) == 1 and message in lines[0] and "Traceback" not in output, output
    assert f"Everything is saved in {out}. The same command with --push_only pushes it later." in lines[0]
    assert before <= {path.name for path in out.iterdir()}
    hub.failures.clear()
    hub.repos.pop("tester/failing", None)
    status, _ = session.run(*arguments, "--hub_model_id", "failing")
    assert (
        status == 0
        and hub.repos["tester/failing"]["files"]["model.safetensors"] == (out / "model.safetensors").read_bytes()
    )


def test_refusals_come_before_training_and_a_hub_that_is_down_holds_none_up(hub, session, tmp_path):
    recipe, out = write(tmp_path, "tiny", TINY), tmp_path / "out"
    arguments = [recipe, "--output_dir", out, "--push_to_hub", "--num_train_epochs", "2"]
    status, output = session.run(*arguments, token="hf_wrong")
    assert status == 1 and "the Hub does not know the token (401)" in output
    assert not list(out.glob("checkpoint-*")) and not (out / "all_results.json").exists()
    for failure in (("POST", CREATE, 503), ("POST", COMMIT, "cut")):
        hub.fail(*failure)
    status, output = session.run(*arguments)
    assert status == 1 and "Training starts without it." in output and "with --push_only pushes it later" in output, (
        output
    )
    assert "Traceback" not in output and (out / "all_results.json").exists()
    hub.failures.clear()
    status, output = session.run(*arguments)
    assert status == 0 and "Finished before" in output and "tester/out" in output
    assert "README.md" in hub.repos["tester/out"]["files"]
    status, output = session.run(*arguments[:2], tmp_path / "other", "--push_only")
    assert status == 2 and "holds no finished training: run the recipe without --push_only first" in output


def test_failures_of_pushes_while_training_are_logged_and_survived(hub, session, tmp_path):
    hub.fail("POST", COMMIT, 403, times=2)
    options = ["--push_to_hub", "--hub_strategy", "every_save", "--hub_always_push", "--hub_model_id", "tester/while"]
    status, output = session.run(write(tmp_path, "tiny", IMAGE), *options, "--output_dir", tmp_path / "out")
    assert status == 0 and hub.repos["tester/while"]["commits"][-1] == "End of training"
    assert "A checkpoint: " in output and "(403)" in output, output + str(hub.requests[-40:])


def test_push_to_hub_of_a_trainer(hub, session, tmp_path):
    code = f"""
from hf_trim import TrimmingArguments, TrimmingTrainer
from tests.support.helpers import digits, tiny_vit
args = TrimmingArguments({str(tmp_path / "mine")!r}, num_train_epochs=2, trim_keep_end=0.5,
                         hub_token={TOKEN[::-1]!r}[::-1], use_cpu=True, report_to="none")
trainer = TrimmingTrainer(tiny_vit(), args, train_dataset=digits(), eval_dataset=digits())
trainer.train()
trainer.evaluate()
trainer.push_to_hub(dataset="digits", license="mit", tags=["own"])
"""
    session.code(code)
    repo = hub.repos["tester/mine"]
    assert without_token(repo)
    card = card_of(repo)
    assert card.data.tags == ["own", "hf-trim", "generated_from_trainer"] and card.data.license == "mit"
    assert [result.metric_type for result in card.data.eval_results] == ["loss"]
    assert "p fell from 1.0 to 0.5 by epoch, over 2 epochs" in card.text
    assert {"training_args.json", "trainer_state.json", "model.safetensors", "curves.png"} <= set(repo["files"])
    hub.fail("POST", COMMIT, 403)
    expected = "import pytest\nwith pytest.raises(OSError, match='Everything is saved in'):\n    trainer.push_to_hub"
    session.code(code.replace("/mine", "/other").replace("trainer.push_to_hub", expected))
    assert (tmp_path / "other" / "model.safetensors").is_file()


def test_a_token_is_copied_but_never_saved(tmp_path):
    args = TrimmingArguments(str(tmp_path), use_cpu=True)
    args.hub_token = UnsavedToken(TOKEN)
    assert copy.deepcopy(args).hub_token == copy.copy(args).hub_token == TOKEN
    assert TOKEN.encode() not in pickle.dumps(args) and pickle.loads(pickle.dumps(args)).hub_token is None


@pytest.mark.parametrize("task", sorted(set(CALLS) - {"image-classification", "text-classification"}))
def test_the_lines_that_load_a_model_run(task, tmp_path):
    tokenizer = load_processing_class(ModelArguments(model_name_or_path="minilm"))
    kind, auto_class = {
        "text-generation": ("gpt2", AutoModelForCausalLM),
        "token-classification": ("bert", AutoModelForTokenClassification),
        "fill-mask": ("bert", AutoModelForMaskedLM),
    }[task]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    auto_class.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    names = {}
    exec(_usage({"task": task}, str(tmp_path)), names)
    assert names["pipe"].task == task


def test_the_page_says_so_if_trimming_did_harm(finished, tmp_path):
    summary = json.loads((finished[1] / "run.json").read_text())

    def page(trimmed):
        for arm, errors in (("plain", [5.0] * 5), ("trimmed", trimmed), ("random", [5.5] * 5)):
            for seed, error in enumerate(errors):
                write_json(tmp_path / "records" / f"{arm}-seed{seed}.json", record(arm, seed, error))
        return render_card(summary, "a/b", tmp_path).text

    raised = page([6.0, 7.0, 8.0, 6.0, 8.0])
    assert "Trimming raised the test error here, and did harm: by +2.00 on average (95 % interval +" in raised
    assert "A random subset of the same size changed it by +0.50." in raised
    assert "Trimming lowered the test error here: by −1.20 on average" in page([3.0, 4.0, 4.5, 4.5, 3.0])
    assert "by no more than chance may: by +0.10" in page([4.0, 6.0, 5.5, 4.0, 6.0])
