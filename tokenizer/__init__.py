"""The l-DeTok tokenizer: network, corruption, losses."""
