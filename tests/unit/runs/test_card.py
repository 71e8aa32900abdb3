import json

import pytest
import yaml
from huggingface_hub import ModelCard

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.runs.card import write_card

RECORD = {"metric": "perplexity", "stderr": 0.5, "n": 16, "fewshot": 0, "source": "local: text", "versions": {}}


@pytest.fixture
def left(tmp_path):
    """A run directory and an exported folder beside it; the words choose the configuration."""

    def build(*words, results=True):
        run, folder = tmp_path / "run", tmp_path / "out"
        run.mkdir()
        folder.mkdir()
        [config] = Composer().jobs(force_dotted(["method=svd_llm", "task=perplexity", *words]), multirun=False)
        (run / "config.yaml").write_text(yaml.safe_dump(config.resolved()))
        plan = {"ranks": {"a": 4, "b": 9, "c": 5}, "parameters_before": 1000, "parameters_after": 800}
        (run / "plan.json").write_text(json.dumps(plan))
        if results:
            states = (("dense", 20.0), ("compressed", 44.0), ("final", 33.0))
            records = [{**RECORD, "task": "wikitext2", "value": v, "checkpoint": c} for c, v in states]
            (run / "results.json").write_text(json.dumps(records))
        (folder / "config.json").write_text(json.dumps({"auto_map": {}, "lowrank": {"ranks": {"a": 4}}}))
        return run, folder, config

    return build


def test_the_card_has_recipe_ranks_results_and_licence_of_the_base(left):
    run, folder, config = left("model=smollm2_135m")
    write_card(folder, run, "me/small")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert {"lowrank_kit", "svd_llm"} <= set(card.data.tags)
    # Packaged weights are no repository of the hub.
    assert card.data.base_model is None
    recipe = yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe == {key: value for key, value in config.resolved().items() if key not in ("run", "tracker")}
    assert "1,000 before, 800 after (-20.0 %)" in card.text
    assert "Ranks of 3 matrices: 4 to 9, median 5" in card.text
    assert "| wikitext2 | perplexity | base model | 20 | 0.5 | 16 | local: text |" in card.text
    assert "| wikitext2 | perplexity | this model | 33 |" in card.text
    assert 'from_pretrained("me/small")' in card.text


def test_a_model_from_before_its_recovery_has_its_own_figures(left):
    run, folder, _ = left("model=smollm2_135m")
    write_card(folder, run, "small", measured="compressed")
    text = (folder / "README.md").read_text()
    assert "| this model | 44 |" in text
    assert "| after recovery | 33 |" in text


def test_the_licence_of_a_folder_is_what_its_card_says_or_unknown(left, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    run, folder, _ = left("model.name=mine", f"model.path={base}", results=False)
    write_card(folder, run, "small")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "unknown"
    assert "Licence of the base: unknown" in card.text
    assert "None: the run was not evaluated" in card.text
    (base / "README.md").write_text("---\nlicense: mit\n---\nBase.\n")
    write_card(folder, run, "small")
    assert ModelCard.load(folder / "README.md").data.license == "mit"


def test_a_base_on_the_hub_is_linked_and_offline_its_licence_is_unknown(left, monkeypatch):
    run, folder, _ = left("model.name=theirs", "model.path=nobody/no-such-model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_card(folder, run, "small")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.license) == ("nobody/no-such-model", "unknown")


def test_an_adapter_says_how_peft_loads_it(left, tmp_path):
    run, folder, _ = left("model=smollm2_135m")
    (folder / "config.json").unlink()
    adapter = {"task_type": "SEQ_CLS", "base_model_name_or_path": "/home/somebody/base"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    write_card(folder, run, "me/adapter")
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    assert 'PeftModel.from_pretrained(base, "me/adapter")' in card.text
    assert "AutoModelForSequenceClassification" in card.text
    assert "somebody" not in card.text


def test_a_checkpoint_of_no_run_says_so(left):
    _, folder, _ = left()
    write_card(folder, None, "small")
    assert "Unknown: this checkpoint is of no run directory." in (folder / "README.md").read_text()
