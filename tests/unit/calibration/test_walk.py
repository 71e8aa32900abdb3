"""A walk gives what the model's own passes give: hidden states forwards, gradients backwards."""

import pytest
import torch

from lowrank_kit.calibration.gradients import weight_gradients
from lowrank_kit.calibration.hidden import Hidden
from lowrank_kit.calibration.next_token_loss import model_loss
from lowrank_kit.calibration.walk import BlockWalk
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of

MODELS = [("llama", "causal"), ("gemma2", "causal"), ("gpt2", "causal"), ("opt", "causal"), ("bert", "classification")]


@pytest.fixture
def batches():
    """Five rows in three batches, one of them padded."""
    ids = torch.randint(3, 64, (5, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2, 4)]


@torch.no_grad()
def states_of(model, batch):
    """The hidden states before every block, and behind the last one, by hooks in the model's own pass."""
    layout, found = layout_of(model), {}
    # With a cache, GPT-2 masks padding otherwise: what is computed at padding differs.
    model.config.use_cache = False

    def before(index):
        def hook(_module, args):
            found[index] = args[0].clone()

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(before(i)) for i, path in enumerate(layout.blocks)]

    def behind(_module, _args, output):
        found[len(layout.blocks)] = output[0] if isinstance(output, tuple) else output

    handles.append(model.get_submodule(layout.blocks[-1]).register_forward_hook(behind))
    model(**batch)
    for handle in handles:
        handle.remove()
    return [found[i] for i in range(len(layout.blocks) + 1)]


@pytest.mark.parametrize(("family", "head"), MODELS)
def test_hidden_states_are_the_models_own(family, head, tiny_model, batches):
    model = tiny_model(family, head)
    walk = BlockWalk(model, layout_of(model), batches)
    expected = [states_of(model, batch) for batch in batches]
    for block in walk.forward():
        for number in walk.numbers:
            assert torch.equal(walk.states[number], expected[number][block.index])
    for number in walk.numbers:
        assert torch.equal(walk.states[number], expected[number][-1])


def test_an_encoders_states_go_to_its_decoder(tiny_model, batches):
    model = tiny_model("t5", "seq2seq")
    inputs = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
    walk = BlockWalk(model, layout_of(model), inputs)
    expected = [states_of(model, batch) for batch in inputs]
    for block in walk.forward():
        for number in walk.numbers:
            assert torch.equal(walk.states[number], expected[number][block.index])
    assert torch.equal(walk.states[0], expected[0][-1])


@pytest.mark.parametrize("original", [True, False])
def test_later_blocks_read_what_the_original_or_what_the_changed_block_gives(original, tiny_model, batches):
    model = tiny_model("llama")
    expected = states_of(model, batches[0])[2]
    for block in BlockWalk(model, layout_of(model), batches).forward():
        if block.index == 0 and original:
            block.pass_on()
        if block.index == 0:
            model.model.layers[0].mlp.down_proj.weight.data.mul_(3)
        if block.index == 2:
            found = block.walk.states[0].clone()
    assert torch.equal(found, expected) == original
    assert torch.equal(found, states_of(model, batches[0])[2]) != original


def test_watchers_are_told_the_batch_and_then_leave(tiny_model, batches):
    model = tiny_model("llama")
    layout, seen = layout_of(model), []
    name = layout.linears[0].name
    walk = BlockWalk(model, layout, batches)
    for block in walk.forward(until=1):
        with walk.watching({name: lambda number, x: seen.append((number, x.shape[0]))}):
            block.pass_on()
    assert seen == [(0, 2), (1, 2), (2, 1)]
    model(**batches[0])
    assert len(seen) == 3


def test_passes_begin_at_kept_states_and_end_as_ever(tiny_model, batches):
    model = tiny_model("llama")
    layout, runs = layout_of(model), []
    walk = BlockWalk(model, layout, batches)
    walk.keep([1, len(layout.blocks)])
    whole = model(**batches[1]).logits
    for index, path in enumerate(layout.blocks):
        model.get_submodule(f"{path}.mlp").register_forward_hook(lambda *_, index=index: runs.append(index))
    for begin, run in ((0, [0, 1, 2]), (1, [1, 2]), (2, [1, 2]), (3, [])):
        runs.clear()
        with walk.begun(1, begin):
            assert torch.equal(model(**batches[1]).logits, whole)
        assert runs == run[: len(layout.blocks)] or begin == 2


def test_gradients_go_through_the_decoder_into_the_encoder(tiny_model, batches):
    model = tiny_model("t5", "seq2seq")
    layout = layout_of(model)
    [batch] = [{**batches[0], "labels": batches[0]["input_ids"]}]
    found = weight_gradients(BlockWalk(model, layout, [batch]), layout.linears, loss=model_loss)
    model(**batch).loss.backward()
    for ref in layout.linears:
        expected = weight_of(model.get_submodule(ref.name)).new_tensor(0) + model.get_submodule(ref.name).weight.grad
        torch.testing.assert_close(found[ref.name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("limit", "on_disk"), [(2**20, 0), (100, 2), (0, 3)])
def test_what_exceeds_the_limit_lies_on_disk_and_comes_back_equal(dtype, limit, on_disk, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hidden = Hidden(torch.device("cpu"), memory_bytes=limit)
    tensors = {key: torch.randn(3, 4, 2 if dtype is torch.float32 else 4).to(dtype) for key in range(3)}
    for _ in range(2):
        for key, tensor in tensors.items():
            hidden[key] = tensor
            before = tensor.clone()
            tensor += 1
            assert torch.equal(hidden[key], before)
            hidden[key] = tensor
    assert all(torch.equal(hidden[key], tensor) for key, tensor in tensors.items())
    assert hidden.files == on_disk


def test_room_that_is_given_back_is_used_again():
    hidden = Hidden(torch.device("cpu"), memory_bytes=40)
    for number in range(5):
        hidden[number] = torch.zeros(10)
        del hidden[number]
        assert number not in hidden
    assert hidden.files == 0


def test_a_full_disk_is_reported(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(LowRankKitError, match=r"40 bytes .*No space left.* TMPDIR"):
        Hidden(torch.device("cpu"), memory_bytes=0)["state"] = torch.zeros(10)
