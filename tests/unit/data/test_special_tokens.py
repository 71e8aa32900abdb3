import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma2Config, LlamaConfig, PreTrainedTokenizerFast

from lowrank_kit.data.instructions import Example, encode
from lowrank_kit.data.special_tokens import check_embedded, opening_of, put_before
from lowrank_kit.errors import ConfigError

WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {letter: 4 + n for n, letter in enumerate("abcdefgh")}
GEMMA, LLAMA = Gemma2Config(vocab_size=12), LlamaConfig(vocab_size=12)


def tokenizer(bos: bool = False, eos: bool = False, **names: str | None) -> PreTrainedTokenizerFast:
    """One token a letter, with what ``add_bos_token`` and ``add_eos_token`` put around a text."""
    made = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    found = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=made, **{k: v for k, v in found.items() if v})


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize(
    ("choice", "bos", "model", "begun"),
    [
        ("auto", True, LLAMA, True),
        ("auto", False, LLAMA, False),
        ("auto", False, None, False),
        # lm-eval's own rule for the family.
        ("auto", False, GEMMA, True),
        ("never", True, GEMMA, False),
        ("always", False, LLAMA, True),
        ("always", True, LLAMA, True),
    ],
)
def test_bos_begins_a_text_where_the_rule_says_so_and_the_end_token_never_ends_it(choice, bos, eos, model, begun):
    its = tokenizer(bos, eos)
    opening = opening_of(choice, its, model)
    assert opening.encode(["a b", "c"], its) == ([[1, 4, 5], [1, 6]] if begun else [[4, 5], [6]])
    assert (len(opening), opening.facts()) == (
        int(begun),
        {"choice": choice, "token": "<s>" if begun else None, "id": 1 if begun else None},
    )
    assert str(opening) == ("each begun with <s>" if begun else "no BOS")


def test_a_bos_that_is_written_out_is_not_put_there_twice():
    assert opening_of("always", tokenizer()).encode(["<s> a", "a <s>"], tokenizer()) == [[1, 4], [1, 4, 1]]


def test_a_tokenizer_without_bos_has_none_to_put():
    plain = tokenizer(bos_token=None)
    assert len(opening_of("auto", plain, GEMMA)) == 0
    with pytest.raises(ConfigError, match=r"calibration\.bos=always: .* no BOS token .* use calibration\.bos=auto"):
        opening_of("always", plain, key="calibration.bos")
    # It puts one there all the same, under no name.
    assert opening_of("auto", tokenizer(bos=True, bos_token=None)).ids == [1]


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (False, True), (True, False), (True, True)])
def test_what_a_tokenizer_puts_before_a_text_is_found_though_it_knows_no_word(bos, eos):
    ignorant = tokenizer(bos, eos)
    ignorant.backend_tokenizer.model = models.WordLevel({"<s>": 1, "</s>": 2, "b": 5}, unk_token="none")
    for its in (tokenizer(bos, eos), ignorant):
        assert put_before(its) == (1 if bos else None)


@pytest.mark.parametrize(("around", "found"), [("<s> $A", 1), ("$A <s>", None), ("$A", None)])
def test_one_token_that_both_begins_and_ends_texts_is_found_where_it_begins_them(around, found):
    both = tokenizer(eos_token="<s>")
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1)])
    assert put_before(both) == found


@pytest.mark.parametrize("length", [2, 3, 5])
def test_windows_hold_the_text_once_each_behind_bos(length):
    text = torch.arange(4, 12)
    begun = opening_of("always", tokenizer()).windows(text, length)
    assert (begun[:, 0] == 1).all()
    step = length - 1
    assert begun[:, 1:].flatten().tolist() == list(range(4, 4 + 8 // step * step))
    assert opening_of("never", tokenizer()).windows(text, length).flatten().tolist() == list(
        range(4, 4 + 8 // length * length)
    )


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_the_prompt_goes_on_into_its_answer_and_one_end_stands_behind_it(bos, eos):
    examples = [
        Example("a b ", "c"),
        Example("a </s>", "c"),
        Example("a", "c </s>"),
        Example("a b", " c d", continues=True),
        Example("a b </s>", " c", continues=True),
    ]
    rows = encode(examples, tokenizer(bos, eos), 32, of="x", key="k")
    first = [1] if bos else []
    assert rows["input_ids"][:] == [
        [*first, 4, 5, 6, 2], [*first, 4, 2, 6, 2], [*first, 4, 6, 2], [*first, 4, 5, 6, 7], [*first, 4, 5, 2, 6],
    ]  # fmt: skip
    learnt = [[label for label in labels if label != -100] for labels in rows["labels"]]
    assert learnt == [[6, 2], [6, 2], [6, 2], [6, 7], [6]]


def test_an_example_with_nothing_to_learn_is_left_out(caplog):
    endless = tokenizer(eos_token=None)
    rows = encode([Example("a", ""), Example("a", "b")], endless, 8, of="x", key="k")
    assert rows["input_ids"][:] == [[4, 5]]
    assert "1 rows of x" in caplog.text


def test_a_token_beyond_the_embedding_is_named_with_what_to_do():
    check_embedded([[], [11]], tokenizer(), LLAMA, "x")
    with pytest.raises(ConfigError, match=r"x: the token 'h' has the id 11, .* 11 rows .*resize_token_embeddings"):
        check_embedded([[4], [11, 2]], tokenizer(), LlamaConfig(vocab_size=11), "x")
