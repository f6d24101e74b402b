"""Configs of what Keras can save and of what it cannot."""

from __future__ import annotations

import json

import keras
import pytest
from _helpers import run_python

import keras_blocksparse as kbs
from keras_blocksparse.serialization import LostObject, deserialize, serialize


@pytest.mark.parametrize("value", [None, "max", 3, 0.5, True])
def test_plain_values_stand_for_themselves(value):
    assert serialize(value) == value
    assert deserialize(serialize(value)) == value


def test_registered_objects_come_back_through_json():
    schedule = kbs.PolynomialDecay(final_sparsity=0.9, begin_step=1, end_step=5)
    assert deserialize(json.loads(json.dumps(serialize(schedule)))) == schedule
    uniform = kbs.Uniform(gate_density={"h": 4}, layer_sparsity={"decoder": 0.8})
    assert deserialize(json.loads(json.dumps(serialize(uniform)))) == uniform


def test_an_object_that_cannot_be_saved_is_itself_within_the_process():
    def schedule(step):
        return True, 0.5

    config = json.loads(json.dumps(serialize(schedule)))
    assert deserialize(config) is schedule
    assert serialize(schedule) == config, "one object has one reference"
    assert deserialize(serialize(lambda step: (True, 0.5))) is not schedule


def test_an_object_with_an_unregistered_config_is_not_trusted_to_it():
    class TfmotLike:
        # tfmot's schedules have get_config, and no way back that Keras 3 knows
        def get_config(self):
            return {"class_name": "TfmotLike", "config": {}}

        def __call__(self, step):
            return True, 0.5

    schedule = TfmotLike()
    assert deserialize(serialize(schedule)) is schedule


def test_in_another_process_it_is_known_by_name_as_lost():
    def my_schedule(step):
        return True, 0.5

    code = """
import sys
from keras_blocksparse.serialization import deserialize
lost = deserialize(sys.argv[1])
print(type(lost).__name__, lost.description)
"""
    out = run_python(code, serialize(my_schedule)).split(maxsplit=1)
    assert out[0] == LostObject.__name__
    assert "my_schedule" in out[1]


def test_two_processes_do_not_mix_up_their_objects():
    # References are numbered; the first object of another process must not come back as ours.
    code = "from keras_blocksparse.serialization import serialize; print(serialize(lambda step: (True, 0.9)))"
    foreign = run_python(code).strip()
    serialize(lambda step: (False, 0.1))
    assert isinstance(deserialize(foreign), LostObject)


def test_settings_of_a_lost_schedule_warn_and_keep_the_masks():
    from keras_blocksparse.constraints import PruningSettings

    with pytest.warns(UserWarning, match="the_schedule was a Python object that Keras could not save"):
        settings = PruningSettings(LostObject("the_schedule"))
    assert settings.schedule is None
    assert keras.saving.get_registered_name(type(settings)) == "PruningSettings"
