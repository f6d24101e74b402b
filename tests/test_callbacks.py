"""UpdatePruningStep: what it warns of, in which numbers, and that the last update always happens."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
import pytest
from _helpers import assert_sparsity, pruned_weights, sequence_data
from keras import layers

import keras_blocksparse as kbs

BLOCK = (4, 4)


def model_with(schedule: Any, optimizer: Any = "sgd") -> keras.Model:
    model = keras.Sequential([keras.Input((4, 8)), layers.GRU(12), layers.Dense(3)])
    kbs.prune_low_magnitude_block(model, schedule, BLOCK, filters="gru")
    model.compile(optimizer, "mse")
    return model


def fit(model: Any, epochs: int = 2, **options: Any) -> list[str]:
    """Trains for four batches an epoch and returns what was warned of."""
    x, y = sequence_data()
    arguments = {"batch_size": 8, "callbacks": [kbs.UpdatePruningStep()], **options}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y, epochs=epochs, verbose=0, **arguments)
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def decay(begin: int, end: int, frequency: int = 2) -> kbs.PolynomialDecay:
    return kbs.PolynomialDecay(
        initial_sparsity=0.25, final_sparsity=0.75, begin_step=begin, end_step=end, frequency=frequency
    )


def assert_all(model: Any, sparsity: float) -> None:
    for variable, gates in pruned_weights(model):
        assert_sparsity(variable, BLOCK, sparsity, gates)


@pytest.mark.parametrize(
    "schedule",
    [
        decay(1, 7),
        decay(0, 8),
        decay(8, 8),
        decay(0, 0),
        decay(1, 1),
        decay(1, 6, 100),
        kbs.ConstantSparsity(target_sparsity=0.75),
    ],
)
def test_a_schedule_that_fits_does_not_warn_and_gets_to_its_end(schedule):
    model = model_with(schedule)
    assert fit(model) == []
    assert_all(model, 0.75)


@pytest.mark.parametrize(("begin", "end", "frequency"), [(0, 7, 3), (1, 8, 5), (2, 3, 50), (3, 3, 7), (0, 5, 4)])
def test_an_end_off_the_frequency_grid_is_applied(begin, end, frequency):
    model = model_with(decay(begin, end, frequency))
    assert fit(model) == []
    assert_all(model, 0.75)


def test_a_schedule_that_never_fires_warns_with_both_numbers():
    (message,) = fit(model_with(decay(100, 200)))
    assert "never fires" in message
    assert "begin_step=100" in message
    assert "2 epochs of 4 batches, ends at step 8" in message


def test_a_schedule_that_does_not_get_to_its_end_warns_with_both_numbers():
    model = model_with(decay(2, 50))
    (message,) = fit(model)
    assert "does not get to its end" in message
    assert "end_step=50" in message
    assert "ends at step 8" in message


def test_an_endless_schedule_that_never_fires_warns():
    (message,) = fit(model_with(kbs.ConstantSparsity(target_sparsity=0.5, begin_step=9)))
    assert "begin_step=9" in message


def test_a_schedule_that_is_over_before_it_began_warns():
    model = model_with(decay(0, 3))
    x, y = sequence_data()
    model.train_on_batch(x, y)
    for _ in range(4):
        model.train_on_batch(x, y)
    (message,) = fit(model)
    assert "never fires" in message
    assert "end_step=3" in message
    assert "starts at step 5" in message


def test_a_second_fit_after_the_end_does_not_warn():
    model = model_with(decay(1, 7))
    assert fit(model) == []
    assert fit(model) == []


def test_accumulated_gradients_count_as_one_step():
    optimizer = keras.optimizers.SGD(gradient_accumulation_steps=4)
    (message,) = fit(model_with(decay(0, 5), optimizer))
    assert "ends at step 2" in message
    assert "one step for 4 batches" in message
    optimizer = keras.optimizers.SGD(gradient_accumulation_steps=4)
    model = model_with(decay(0, 2, 1), optimizer)
    assert fit(model) == []
    assert_all(model, 0.75)


def test_initial_epoch_is_counted():
    assert fit(model_with(decay(1, 8)), epochs=3, initial_epoch=1) == []
    (message,) = fit(model_with(decay(1, 9)), epochs=3, initial_epoch=1)
    assert "end_step=9" in message
    assert "ends at step 8" in message


def test_steps_per_epoch_is_counted():
    (message,) = fit(model_with(decay(1, 5)), steps_per_epoch=2)
    assert "ends at step 4" in message


def test_training_that_is_stopped_early_says_where():
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.stop_training = True

    (message,) = fit(model_with(decay(1, 7, 1)), callbacks=[Stop(), kbs.UpdatePruningStep()])
    assert "stopped at step 4" in message
    assert "end_step=7" in message


def test_the_sparsity_is_logged():
    model = model_with(decay(1, 7))
    x, y = sequence_data()
    history = model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[kbs.UpdatePruningStep()])
    logged = history.history["sparsity"]
    assert logged == sorted(logged)
    assert logged[-1] == pytest.approx(kbs.sparsity(model))


def test_without_pruning_it_is_an_error():
    model = keras.Sequential([keras.Input((4, 8)), layers.GRU(12), layers.Dense(3)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"Nothing in .* is under pruning.*prune_low_magnitude_block"):
        fit(model)


def test_without_pruning_it_is_an_error_for_a_model_that_is_not_built():
    model = keras.Sequential([layers.GRU(12), layers.Dense(3)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"Nothing in .* is under pruning"):
        fit(model)


@pytest.mark.parametrize("built", [True, False])
def test_without_the_callback_training_warns(built):
    stack = [keras.Input((4, 8))] if built else []
    model = keras.Sequential([*stack, layers.GRU(12), layers.Dense(3)])
    kbs.prune_low_magnitude_block(model, decay(1, 5), BLOCK, filters="gru")
    model.compile("sgd", "mse")
    told = fit(model, callbacks=[])
    assert told
    assert all("nothing moves its mask" in message and "UpdatePruningStep" in message for message in told)


def test_evaluate_and_predict_warn_of_nothing():
    model = model_with(decay(1, 5))
    x, y = sequence_data()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.evaluate(x, y, verbose=0)
        model.predict(x, verbose=0)


def test_weights_that_diverge_stop_the_training_with_their_name():
    model = model_with(decay(1, 7, 1), keras.optimizers.SGD(1e30))
    with pytest.raises(ValueError, match=r"gru.*holds NaN or infinity"):
        fit(model, epochs=4)


def test_one_callback_object_serves_several_fits_and_models():
    update = kbs.UpdatePruningStep()
    for _ in range(2):
        model = model_with(decay(1, 7))
        assert fit(model, callbacks=[update]) == []
        assert_all(model, 0.75)


def test_validation_in_between_changes_nothing():
    model = model_with(decay(1, 7))
    x, y = sequence_data()
    assert fit(model, validation_data=(x, y)) == []
    assert_all(model, 0.75)


def test_a_callable_without_begin_and_end_is_followed():
    steps = []

    def schedule(step: int) -> tuple[bool, float]:
        steps.append(step)
        return step in (3, 6), 0.25 if step < 6 else 0.5

    model = model_with(schedule)
    seen = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append(round(kbs.sparsity(self.model), 1))

    assert fit(model, callbacks=[kbs.UpdatePruningStep(), Record()]) == []
    assert seen[:2] == [0, 0]
    assert len(set(seen[2:5])) == 1
    assert len(set(seen[5:])) == 1
    assert_all(model, 0.5)
    assert set(steps) >= set(range(1, 9))


def test_masks_move_only_when_the_schedule_says_so():
    model = model_with(decay(2, 6, 2))
    masks = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            masks.append([v.numpy() == 0 for v, _ in pruned_weights(self.model)])

    fit(model, callbacks=[kbs.UpdatePruningStep(), Record()])
    same = [all(np.array_equal(a, b) for a, b in zip(masks[i], masks[i + 1], strict=True)) for i in range(7)]
    # between steps 1-2, 2-3, ...: updates at 2, 4 and 6
    assert same == [False, True, False, True, False, True, True]


def taught(student: keras.Model) -> tuple[keras.Model, keras.Model]:
    """A distiller around a student, and its teacher."""
    if not hasattr(keras, "distillation"):
        pytest.skip("keras.distillation is of Keras 3.12")
    teacher = keras.Sequential([keras.Input((4, 8)), layers.GRU(12), layers.Dense(3)])
    distiller = keras.distillation.Distiller(
        teacher, student, keras.distillation.LogitsDistillation(temperature=1.0), student_loss_weight=0.4
    )
    distiller.compile("sgd", "mse")
    return distiller, teacher


def test_the_student_of_a_distiller_is_pruned_and_its_teacher_is_not():
    student = model_with(decay(1, 7))
    distiller, teacher = taught(student)
    before = teacher.get_weights()
    assert not fit(distiller)
    assert_all(student, 0.75)
    for weight, old in zip(teacher.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, old)


def test_group_lasso_that_a_distiller_would_leave_out_is_refused():
    student = keras.Sequential([keras.Input((4, 8)), layers.GRU(12), layers.Dense(3)])
    kbs.prune_low_magnitude_block(student, decay(1, 7), BLOCK, filters="gru", group_lasso=1e-3)
    with pytest.raises(ValueError, match="leaves regularizers out"):
        fit(taught(student)[0])
