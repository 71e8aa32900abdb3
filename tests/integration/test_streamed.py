"""Models that are compressed while one block of them is in memory: the same bytes as of one that is there whole."""

import json
import os
import random
import resource
import sys
import time
from contextlib import contextmanager

import pytest
import torch
import warm
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.models.fingerprint import fingerprint
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import ModelSource, load_model, open_streamed
from lowrank_kit.models.streamed import Streamed, weights_of
from lowrank_kit.pipeline import execute

STREAMED = "runtime.weights=streamed"


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(run, other):
    """Whether two runs left the same plan, results and weights, bit for bit."""
    assert json.loads((run / "plan.json").read_text()) == json.loads((other / "plan.json").read_text())
    found, expected = tensors(run / "checkpoint"), tensors(other / "checkpoint")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    configs = [json.loads((each / "checkpoint" / "config.json").read_text()) for each in (run, other)]
    assert configs[0] == configs[1]


@pytest.fixture
def words_of(language_arguments, tmp_path, monkeypatch):
    """The words of a command that works in a folder and with a cache of its own, from here on."""

    def build(name, *words, method="svd_llm", **settings):
        monkeypatch.setenv("LOWRANK_KIT_CACHE", str(tmp_path / name / "cache"))
        stages = "run.stages=[calibrate,plan,apply]"
        words = ["method.ratio=0.4", "method.rank_multiple=1", stages, f"run.root={tmp_path / name}", *words]
        return language_arguments(*words, method=method, **settings)

    return build


@pytest.fixture
def command(words_of, composed):
    """Run a command in a folder and with a cache of its own."""
    return lambda name, *words, **settings: execute(composed(words_of(name, *words, **settings)))


METHODS = ["svd", "svd_llm", "svd_llm_v2", "d_rank", "hisvd", "fwsvd", "kfac_svd", "zs_svd"]
KEPT = "method.allocation.keep.influence=0.5"
PIVOT = "storage=pivot"


@pytest.mark.parametrize("method", METHODS)
def test_streamed_is_resident_bit_for_bit(method, command):
    same(command("streamed", STREAMED, method=method), command("resident", method=method))


@pytest.mark.parametrize("word", ["dtype=bfloat16", KEPT, "method.roles=[gate,up,down]", PIVOT])
def test_so_are_half_precision_floors_and_blocks_of_which_little_changes(word, command):
    same(command("streamed", STREAMED, word), command("resident", word))


@pytest.mark.parametrize(("choice", "planned"), [("structure=channels", "kept"), ("storage=bytes", "bits")])
def test_so_are_mlps_that_lose_channels_and_rounded_weights(choice, planned, command):
    words = [choice]
    streamed = command("streamed", STREAMED, *words, method="kfac_svd")
    assert json.loads((streamed / "plan.json").read_text())[planned]
    same(streamed, command("resident", *words, method="kfac_svd"))


@pytest.mark.parametrize("word", [*(f"correction={kind}" for kind in ("sequential", "refine")), "dtype=bfloat16"])
def test_so_are_corrections(word, command):
    words = ["correction=residual", "calibration.batch_size=2", word]
    same(command("streamed", STREAMED, *words, method="kfac_svd"), command("resident", *words, method="kfac_svd"))


@pytest.mark.parametrize("family", ["gemma2", "opt", "gpt2"])
def test_every_family_streams(family, command, checkpoint):
    words = [f"model.path={checkpoint(family)}"]
    same(command("streamed", STREAMED, *words), command("resident", *words))


def test_what_is_left_loads_in_plain_transformers(command):
    folder = command("streamed", STREAMED) / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert fingerprint(model, layout_of(model)) == fingerprint(*_loaded(folder))
    assert {file.name for file in folder.glob("model*")} >= {"model.safetensors.index.json"}
    assert not (folder.parent / ".checkpoint").exists()


def _loaded(folder):
    model = load_model(ModelSource(str(folder)), "causal").model
    return model, layout_of(model)


BYTES = ("storage=bytes", "truncation=optimal", "allocation=lagrangian", "method.dense=true", "method.ratio=0.7")


CORRECTED = ("correction=residual", "structure=channels", "truncation=two_sided", "allocation=lagrangian")


@pytest.mark.parametrize("words", [(), (PIVOT,), BYTES, CORRECTED], ids=str)
def test_a_killed_run_goes_on_at_its_block(words, command, monkeypatch):
    class Killed(Exception):
        pass

    written, write = [], Streamed.write

    def dies(weights, index):
        if index == 1 and 1 not in written:
            written.append(1)
            raise Killed
        written.append(index)
        write(weights, index)

    monkeypatch.setattr(Streamed, "write", dies)
    with pytest.raises(Killed):
        command("streamed", STREAMED, *words)
    assert written == [0, 1]
    run = command("streamed", STREAMED, *words)
    assert written == [0, 1, 1, 2][: len(written)]
    assert written.count(0) == 1
    same(run, command("resident", *words))


AT_WORK = """
import sys
from matplotlib.figure import Figure
from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.pipeline import execute
Figure.savefig = lambda figure, file, **options: open(file, "w").close()
[config] = Composer().jobs(force_dotted(sys.argv[1:]), multirun=False)
execute(config)
"""


def killed(words, is_reached):
    """Run a command in a process of its own, and kill that outright as soon as it is there."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = warm.Command(["-c", AT_WORK, *words], environment)
    while process.is_alive() and not is_reached():
        time.sleep(0.001)
    process.kill()
    process.wait()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.nightly)])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(kills, command, words_of, tiny_model, checkpoint, tmp_path):
    model, blocks = tmp_path / "model", 40
    tiny_model("llama", num_hidden_layers=blocks).save_pretrained(model, max_shard_size="200KB")
    AutoTokenizer.from_pretrained(checkpoint("llama")).save_pretrained(model)

    def files(run):
        return {file.name: file.read_bytes() for file in (run / "checkpoint").iterdir()}

    def done(name):
        """Blocks decomposed, and shards written; what is being written counts, too."""
        decomposed = tmp_path.glob(f"{name}/cache/calibration/*/*block-*")
        return len(list(decomposed)), len(list(tmp_path.glob(f"{name}/*/.checkpoint/model-*")))

    expected, draw = files(command("whole", STREAMED, path=model)), random.Random(0)
    for number in range(kills):
        name, moment = f"killed-{number}", draw.randrange(1, 2 * blocks + 1)
        killed(words_of(name, STREAMED, path=model), lambda name=name, moment=moment: sum(done(name)) >= moment)
        print("killed when of {} blocks {} were decomposed and {} written".format(blocks, *done(name)))
        assert files(command(name, STREAMED, path=model)) == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard, other: shard.unlink(), "00002-of-.* is missing"),
        (
            lambda shard, other: os.truncate(shard, shard.stat().st_size - 8),
            "00002-of-.* is damaged",
        ),
        (lambda shard, other: shard.write_bytes(other.read_bytes()), r"it lacks \d+ weights"),
    ],
    ids=["missing", "short", "of another model"],
)
def test_a_shard_that_is_not_the_models_is_named_before_the_work(
    damage, message, command, checkpoint, tiny_model, tmp_path
):
    folder, other = tmp_path / "model", tmp_path / "other"
    tiny_model("llama").save_pretrained(folder, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(checkpoint("llama")).save_pretrained(folder)
    tiny_model("gpt2").save_pretrained(other)
    damage(next(folder.glob("model-00002-of-*")), other / "model.safetensors")
    with pytest.raises(LowRankKitError, match=message):
        command("streamed", STREAMED, f"model.path={folder}")
    assert not list(tmp_path.glob("streamed/*/.checkpoint"))


@pytest.mark.parametrize("correction", ["none", "residual"])
def test_one_block_is_in_memory_at_a_time(correction, command, monkeypatch):
    block, there = Streamed.block, []

    @contextmanager
    def watched(weights, index):
        with block(weights, index):
            modules = [weights._model.get_submodule(path) for path in weights._layout.blocks]
            there.append(sum(any(not p.is_meta for p in module.parameters()) for module in modules))
            yield

    monkeypatch.setattr(Streamed, "block", watched)
    command("streamed", STREAMED, f"correction={correction}", method="kfac_svd")
    assert set(there) == {1}


@contextmanager
def files_of_at_most(size):
    """What a full disk does to large files."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def test_a_full_disk_is_said_and_loses_nothing(command, tmp_path):
    again = "make room and start the run again; it goes on at this file"
    with files_of_at_most(16_000), pytest.raises(LowRankKitError, match=rf"block-0000.* cannot be written .*{again}"):
        command("streamed", STREAMED)
    command("streamed", STREAMED, "run.stages=[calibrate,plan]")
    [cached] = {file.parent for file in tmp_path.glob("streamed/cache/calibration/*/block*")}
    made = {file.name: file.stat().st_mtime_ns for file in cached.glob("block*")}
    with files_of_at_most(16_000), pytest.raises(LowRankKitError, match=rf"model-00001-of-.* cannot be .*{again}"):
        command("streamed", STREAMED)
    same(command("streamed", STREAMED), command("resident"))
    assert {file.name: file.stat().st_mtime_ns for file in cached.glob("block*")} == made


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("grasp", [], "method=grasp needs the whole model in memory"),
        ("swift", [], "measures the whole model"),
        ("svd_llm", ["recovery=lora", "method.rank_multiple=1"], "recovery trains the whole model"),
    ],
)
def test_what_needs_the_whole_model_is_refused(method, words, message, composed, language_arguments):
    with pytest.raises(ConfigError, match=message):
        execute(composed(language_arguments(STREAMED, "method.ratio=0.4", *words, method=method)))


def test_a_checkpoint_of_another_model_is_refused(checkpoint, tmp_path):
    folder = checkpoint("llama")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(LowRankKitError, match=r"it lacks \d+ weights"):
        open_streamed(ModelSource(str(tmp_path)), torch.float32, tmp_path / "out")


def test_a_model_that_is_whole_says_so(tiny_model):
    assert not weights_of(tiny_model("llama")).is_streamed
