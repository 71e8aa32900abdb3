import gc
import weakref

from lowrank_kit.models.load import LoadedModel
from lowrank_kit.stages.models import loaded


def test_a_model_is_read_once_when_it_is_asked_for_and_gone_behind_the_block(tiny_model):
    read = []

    def fresh():
        read.append(1)
        return LoadedModel(tiny_model("llama").__class__(tiny_model("llama").config), ())

    with loaded(fresh) as opened:
        assert not read
        model = weakref.ref(opened.model)
        assert opened.model is opened.loaded.model
        assert len(read) == 1
    gc.collect()
    assert model() is None
