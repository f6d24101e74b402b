"""Speech to characters with CTC: recurrent networks, dense and block-sparse, on made or on people's own speech."""
