"""Character language models of the King James Bible, or of any text: GRU and LSTM, dense and block-sparse."""
