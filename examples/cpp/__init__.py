"""A .tflite file in C++: `main.cc`, and `check.py`, which builds it and compares what it prints with Keras."""
