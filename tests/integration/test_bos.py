"""BOS before every window and prompt: the figures against loops over transformers' own logits."""

import json
from dataclasses import replace

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lowrank_kit.calibration.collect import Reduction, calibrate
from lowrank_kit.calibration.gradients import stream_gradients
from lowrank_kit.calibration.influence import block_influence
from lowrank_kit.calibration.statistics import GradientRequest, StatisticsRequest
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.data.special_tokens import opening_of
from lowrank_kit.evaluation.language_model import BoundedLM
from lowrank_kit.models.layout import layout_of
from lowrank_kit.pipeline import execute

BOS, WINDOW = 1, 32
NAMES = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(60)))


def tokenizer(bos: bool, eos: bool = False) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(NAMES)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = f"{'[BOS] ' if bos else ''}$A{' [EOS]' if eos else ''}"
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("[BOS]", 1), ("[EOS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]", pad_token="[PAD]"
    )


@pytest.fixture
def folder(tmp_path, tiny_model):
    """A checkpoint of a family, with a tokenizer that puts BOS before a text or does not."""

    def build(family="gemma2", **adds):
        path = tmp_path / "_".join([family, *(name for name, put in adds.items() if put)])
        tiny_model(family, initializer_range=0.3).save_pretrained(path)
        tokenizer(**adds).save_pretrained(path)
        return path

    return build


def token_ids(texts_folder, split="test"):
    return [NAMES.index(word) for word in (texts_folder / f"text/mine/{split}.txt").read_text().split()]


def by_hand(path, ids, begun):
    """The mean loss of every window, one forward pass and one loop over positions each, in float64."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    step, found = WINDOW - begun, []
    for start in range(0, len(ids) // step * step, step):
        window = [BOS] * begun + ids[start : start + step]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0]
        losses = [-float(logits[t - 1].log_softmax(0)[window[t]]) for t in range(1, WINDOW)]
        found.append(sum(losses) / len(losses))
    return found


def results(run):
    return json.loads((run / "results.json").read_text())


@pytest.mark.parametrize(
    ("family", "adds", "choice", "begun"),
    [
        ("gemma2", {"bos": True}, "auto", True),
        ("gemma2", {"bos": True}, "never", False),
        ("gemma2", {"bos": False}, "auto", True),
        ("llama", {"bos": False}, "auto", False),
        ("llama", {"bos": True, "eos": True}, "auto", True),
        ("llama", {"bos": False, "eos": True}, "always", True),
    ],
)
def test_perplexity_is_that_of_windows_that_begin_as_asked_and_the_records_say_so(
    language_arguments, composed, texts_folder, folder, family, adds, choice, begun, capsys
):
    path = folder(family, **adds)
    run = execute(composed(language_arguments(f"eval.bos={choice}", method="none", path=path)))
    expected = by_hand(path, token_ids(texts_folder), begun)
    [record] = results(run)
    assert record["value"] == pytest.approx(float(torch.tensor(expected).double().mean().exp()), rel=1e-5)
    assert (record["n"], record["bos"]) == (len(expected), "[BOS]" if begun else "")
    windows = json.loads((run / "windows/final/mine.json").read_text())
    assert windows["nll"] == pytest.approx(expected, rel=1e-5)
    assert windows["predicted_tokens"] == WINDOW - 1
    said = {"choice": choice, "token": "[BOS]" if begun else None, "id": BOS if begun else None}
    assert json.loads((run / "manifest.json").read_text())["bos"]["eval"] == windows["bos"] == said
    assert ("each begun with [BOS]" if begun else "no BOS") in capsys.readouterr().out


def test_a_dense_figure_is_not_found_again_under_another_choice(language_arguments, composed, texts_folder, folder):
    path = folder(bos=True)
    for choice, begun in (("always", True), ("never", False), ("auto", True)):
        words = (f"eval.bos={choice}", "method.ratio=0.3", "method.rank_multiple=1")
        run = execute(composed(language_arguments(*words, path=path)))
        dense = next(record["value"] for record in results(run) if record["checkpoint"] == "dense")
        expected = torch.tensor(by_hand(path, token_ids(texts_folder), begun)).double().mean().exp()
        assert dense == pytest.approx(float(expected), rel=1e-5)
        assert (run / "windows/dense/mine.json").is_file()


@pytest.mark.parametrize(("choice", "begun"), [("always", True), ("never", False)])
def test_calibration_windows_begin_as_asked_and_count_what_they_measure(
    language_arguments, composed, texts_folder, folder, choice, begun
):
    words = (f"calibration.bos={choice}", "method.ratio=0.3", "method.rank_multiple=1", "eval.limit=1")
    run = execute(composed(language_arguments(*words, path=folder(bos=True))))
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["bos"]["calibration"]["id"] == (BOS if begun else None)
    assert manifest["bos"]["eval"] == {"choice": "auto", "token": "[BOS]", "id": BOS}


IDS = torch.randint(4, 64, (3, 9), generator=torch.Generator().manual_seed(0))
BEGUN = torch.cat([torch.full((3, 1), BOS), IDS], 1)
SAMPLES = CalibrationSamples(tuple({"input_ids": row} for row in BEGUN), opening=1)


def inputs_of(model, name):
    """What a linear reads of every row, ``[tokens, in]``, one row at a time."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    with torch.no_grad():
        for row in BEGUN:
            model(row[None])
    hook.remove()
    return seen


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_model_reads_bos_and_no_moment_counts_it(tiny_model, batch_size):
    model = tiny_model("gemma2", initializer_range=0.3)
    layout = layout_of(model)
    request = StatisticsRequest(moments="input", magnitudes=True)
    reduction = Reduction(request, lambda layer: {"gram": layer.moments.gram, "size": layer.magnitudes})
    found = calibrate(model, replace(SAMPLES, batch_size=batch_size), layout.linears, reduction)
    for ref in layout.linears[::3]:
        read = torch.cat([row[1:] for row in inputs_of(model, ref.name)])
        expected = sum(torch.outer(x, x) for x in read)
        torch.testing.assert_close(found[ref.name]["gram"], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[ref.name]["size"], read.abs().mean(0), rtol=1e-4, atol=1e-6)


def test_no_gradient_moment_counts_bos(tiny_model):
    model = tiny_model("llama", initializer_range=0.3)
    layout = layout_of(model)
    name = "model.layers.1.mlp.down_proj"
    found, asked = {}, GradientRequest(moments=True, fisher=True)
    for _, block in stream_gradients(model, layout, SAMPLES.batches(2, 0), layout.linears, asked, opening=1):
        found |= block
    gram, fisher, predicted, counted = torch.zeros(32, 32).double(), torch.zeros(48).double(), 0, 0
    for row, x in zip(BEGUN, inputs_of(model, name), strict=True):
        gradients = []

        def note(_module, _inputs, output, gradients=gradients):
            output.register_hook(lambda grad, gradients=gradients: gradients.append(grad[0].double()))

        hook = model.get_submodule(name).register_forward_hook(note)
        logits = model(row[None]).logits[0]
        sum(-logits[t - 1].log_softmax(0)[row[t]] for t in range(1, 10)).backward()
        hook.remove()
        # BOS predicts the first token: its part belongs to the loss's gradient in the weight, not to the moments.
        of_row = sum(torch.outer(g, read.double()) for g, read in zip(gradients[0], x, strict=True))
        fisher += of_row.square().sum(0)
        predicted += 9
        for g in gradients[0][1:]:
            gram += torch.outer(g, g)
        # The last position predicts nothing.
        counted += 8
    torch.testing.assert_close(found[name].gram.double(), gram / counted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[name].fisher.double(), fisher / predicted, rtol=1e-4, atol=1e-6)
    assert found[name].energy == pytest.approx(float(gram.trace()) / counted, rel=1e-4)


def test_no_blocks_influence_counts_bos(tiny_model):
    model = tiny_model("llama", initializer_range=0.3)
    found = block_influence(model, replace(SAMPLES, batch_size=2))
    with torch.no_grad():
        states = [model.model(row[None], output_hidden_states=True).hidden_states for row in BEGUN]
    for block in range(2):
        pairs = [(s[block][0, t].double(), s[block + 1][0, t].double()) for s in states for t in range(1, 10)]
        expected = sum(1 - float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs) / len(pairs)
        assert float(found[block]) == pytest.approx(expected, rel=1e-4)


def test_statistics_of_samples_with_and_without_opening_are_kept_apart():
    assert SAMPLES.fingerprint() != CalibrationSamples(SAMPLES.sequences).fingerprint()
    assert SAMPLES.without_labels().opening == SAMPLES.first(1).opening == SAMPLES.with_decoder_inputs(0).opening == 1


@pytest.mark.parametrize(
    "adds", [{"bos": True}, {"bos": False}, {"bos": True, "eos": True}, {"bos": False, "eos": True}]
)
@pytest.mark.parametrize("choice", ["always", "never"])
def test_lm_evals_likelihoods_are_of_the_whole_answer_behind_a_prompt_that_begins_as_asked(tiny_model, adds, choice):
    model, its = tiny_model("llama", initializer_range=0.3), tokenizer(**adds)
    lm = BoundedLM(model, its, 4, 64, opening=opening_of(choice, its))
    asked = [("w1 w2", " w3 w4"), ("w5 [EOS]", " w6"), ("[BOS] w7", " w8 w9")]
    requests = [Instance("loglikelihood", {}, pair, i, metadata=("x", i, 1)) for i, pair in enumerate(asked)]
    prefix = [BOS] if choice == "always" else []
    for (found, _), (prompt, answer) in zip(lm.loglikelihood(requests), asked, strict=True):
        before, after = ([NAMES.index(word) for word in text.split()] for text in (prompt, answer))
        before = before if before[0] == BOS else prefix + before
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0].double()
        expected = sum(float(logits[len(before) + n - 1].log_softmax(0)[token]) for n, token in enumerate(after))
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("eos", [False, True])
def test_what_lm_eval_generates_in_a_batch_is_what_transformers_generates_of_each_prompt_alone(tiny_model, side, eos):
    model, its = tiny_model("llama", initializer_range=0.3), tokenizer(True, eos)
    its.padding_side = side
    lm = BoundedLM(model, its, 4, 64)
    prompts = ["w1 w2 w3 w4", "w5", "w7 [EOS]"]
    settings = {"until": [], "max_gen_toks": 4, "do_sample": False}
    requests = [Instance("generate_until", {}, (p, settings), i, metadata=("x", i, 1)) for i, p in enumerate(prompts)]
    for found, prompt in zip(lm.generate_until(requests), prompts, strict=True):
        ids = torch.tensor([[BOS, *(NAMES.index(word) for word in prompt.split())]])
        made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        text = its.decode(made, skip_special_tokens=False).split("[EOS]")[0]
        assert found.split() == [word for word in text.split() if word not in NAMES[:4]]
