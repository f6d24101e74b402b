"""Who is speaking? Nine speakers from recorded vowels: a dense GRU against the same net made block-sparse.

`python -m examples.japanese_vowels --help` tells the options; `make demo` runs it with the defaults.
"""
