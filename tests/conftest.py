"""What every test may rely on: the TensorFlow backend, no GPU, quiet start-up, and the same random numbers."""

import os

# Before anything imports keras or tensorflow; pytest loads this file first, and so does every xdist worker.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import keras
import pytest

# No test is about time: the first call of a TensorFlow op takes longer than hypothesis's 200 ms on a busy machine.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def seeded():
    """Each test begins with the same weights and data, alone or in the suite."""
    keras.utils.set_random_seed(0)
    yield
    keras.backend.clear_session(free_memory=False)  # a collection of garbage after each test costs minutes in all
